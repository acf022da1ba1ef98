"""Measure pipelines side by side: one row of plain keys and numbers each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from distill import __version__
from distill.evaluate.generate import default_inputs, generate
from distill.evaluate.metrics import Context, check_fit, check_metric, measure


@dataclass(frozen=True)
class Entry:
    """A pipeline to measure, and how it is called (its own defaults where None)."""

    name: str
    pipeline: Any
    steps: int | None = None
    guidance_scale: float | None = None


def evaluate(
    entries: Sequence[Entry], metrics: Sequence[str], *, samples: int, batch_size: int = 250, seed: int = 0,
    prompts: Sequence[str] | None = None, context: Context | None = None,
) -> list[dict[str, Any]]:
    """A row per entry: name, steps, guidance_scale, samples, the metrics' numbers, images_per_second, and provenance.

    All entries see the same inputs and the same noise, so that differences are theirs.

    Raises:
        UserError: for a metric that is unknown or does not fit the pipelines (before anything is sampled), or one that
            does not fit the images.
    """
    context = context or Context()
    for name in metrics:
        check_metric(name)
        for entry in entries:
            check_fit(name, entry.pipeline, context)
    inputs_of = [default_inputs(entry.pipeline, samples, prompts) for entry in entries]
    rows: list[dict[str, Any]] = []
    for entry, inputs in zip(entries, inputs_of, strict=True):
        images = generate(
            entry.pipeline, inputs, steps=entry.steps, guidance_scale=entry.guidance_scale, batch_size=batch_size, seed=seed,
            what=f"sampling {entry.name}",
        )
        row: dict[str, Any] = {
            "name": entry.name,
            "steps": _setting(entry.pipeline, "num_inference_steps", entry.steps),
            "guidance_scale": _setting(entry.pipeline, "guidance_scale", entry.guidance_scale),
        }
        row |= measure(images, metrics, context)
        row |= {"images_per_second": round(images.images_per_second, 2), "seconds": round(images.seconds, 2)}
        row |= {"samples": samples, "batch_size": batch_size, "seed": seed, "device": str(entry.pipeline.device), "threads": torch.get_num_threads()}
        row |= {"distill": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
        if len(entries) > 1 and rows:
            row["speedup"] = round(row["images_per_second"] / rows[0]["images_per_second"], 2)
        rows.append(row)
        if samples < 2000 and any(name in ("fd-digits", "fd-emoji", "fid") for name in metrics):
            print(f"distill: {samples} samples bias a Fréchet distance upwards; compare only equal counts", file=sys.stderr)
    return rows


def _setting(pipeline: Any, name: str, given: float | None) -> Any:
    """What a pipeline is called with: as given, or its own default (from its config, or its call's signature)."""
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    if given is not None or parameter is None:
        return given
    return parameter.default if parameter.default is not None else pipeline.config.get(name)
