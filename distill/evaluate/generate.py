"""Images from any diffusers pipeline, and how fast it makes them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.loading import conditioned_on
from distill.progress import track

#: Image i of seed s is drawn from s × this + i: with s + i, all but one image of seed 1 would repeat the noise of seed 0.
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class Images:
    """Generated images and their making."""

    images: Tensor  #: (N, channels, height, width) in [0, 1], on the CPU
    inputs: list[Any]  #: the prompt, class or None of each
    images_per_second: float  #: over the full batches but the first, which warms up (over it too, if there is no other)
    seconds: float


def class_count(pipeline: Any) -> int:
    """Number of real classes of a class-conditional pipeline (its null class not counted)."""
    config = (getattr(pipeline, "unet", None) or pipeline.transformer).config
    count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    return int(count) - (pipeline.config.get("null_class") is not None)


def default_inputs(pipeline: Any, count: int, prompts: Sequence[str] | None = None) -> list[Any]:
    """One input per image: the classes in turn, the prompts in turn, or None.

    Raises:
        UserError: if a text pipeline gets no prompts.
    """
    kind = conditioned_on(pipeline)
    if kind == "prompt":
        if not prompts:
            raise UserError("this pipeline is conditioned on text: give prompts")
        return [prompts[i % len(prompts)] for i in range(count)]
    if kind == "class_labels":
        classes = class_count(pipeline)
        return [i % classes for i in range(count)]
    return [None] * count


@torch.no_grad()
def generate(
    pipeline: Any, inputs: Sequence[Any], *, steps: int | None = None, guidance_scale: float | None = None,
    batch_size: int = 250, seed: int = 0, call: Mapping[str, Any] | None = None, what: str = "sampling",
) -> Images:
    """One image per input, each with a generator of its own: the batch size changes no image, and no two seeds share noise.

    Args:
        steps, guidance_scale: the pipeline's own defaults where None.
        call: further arguments of the pipeline's call.

    Raises:
        UserError: if the inputs do not fit the pipeline.
    """
    kind = conditioned_on(pipeline)
    arguments: dict[str, Any] = {"output_type": "np", **(call or {})}
    if steps is not None:
        arguments["num_inference_steps"] = steps
    if guidance_scale is not None and "guidance_scale" in inspect.signature(pipeline.__call__).parameters:
        arguments["guidance_scale"] = guidance_scale
    parts, seconds = [], []
    for start in track(range(0, len(inputs), batch_size), what):
        chunk = list(inputs[start : start + batch_size])
        arguments["generator"] = [torch.Generator().manual_seed((seed * SEED_STRIDE + start + i) % 2**63) for i in range(len(chunk))]
        arguments["batch_size" if kind is None else kind] = len(chunk) if kind is None else chunk
        before = time.perf_counter()
        try:
            images = pipeline(**arguments).images
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{type(pipeline).__name__} refused the call: {error}") from error
        seconds.append(time.perf_counter() - before)
        parts.append(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    full = sum(len(p) == len(parts[0]) for p in parts)  # a last batch of a few images would say little about speed
    timed = slice(1, full) if full > 1 else slice(0, 1)
    rate = sum(len(p) for p in parts[timed]) / sum(seconds[timed])
    return Images(torch.cat(parts), list(inputs), rate, sum(seconds))
