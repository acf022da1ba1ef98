"""Every tiny pipeline runs, and every pipeline of the installed diffusers release is among them or has a reason not to be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo import ALWAYS_GUIDED, CASES, NOT_RELOADABLE, UNBUILDABLE, absent, build, missing
from zoo.core import exported, modules

STEPS = 4  #: the fewest that every scheduler takes (PNDM's warm-up), with something left at every strength
QUICK = {"StableDiffusionPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusion3Pipeline", "DiTPipeline", "PixArtSigmaPipeline", "SanaSprintPipeline"}


def arrays(output: Any) -> Iterator[np.ndarray]:
    """Every array in what a pipeline returns."""
    if isinstance(output, torch.Tensor):
        yield output.detach().float().numpy()
    elif isinstance(output, np.ndarray):
        yield output.astype(np.float64)
    elif hasattr(output, "convert"):  # a PIL image
        yield np.asarray(output).astype(np.float64)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from arrays(part)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(CASES)])
def test_runs(name: str) -> None:
    """A few steps give finite values that are not all the same."""
    pipeline = build(name)
    accepted = inspect.signature(pipeline.__call__).parameters
    settings = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), "output_type": "np", "return_dict": False}
    found = list(arrays(pipeline(**CASES[name].call(), **{k: v for k, v in settings.items() if k in accepted})))
    assert found and all(np.isfinite(a).all() for a in found)
    assert max(float(a.std()) for a in found) > 1e-4


@pytest.mark.parametrize("name", sorted(QUICK))
def test_builds_are_equal_and_tiny(name: str) -> None:
    """Seeds are set inside, whatever the global state; float32, eval, no network beyond a million parameters."""
    first = modules(build(name))
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    second = modules(build(name))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        assert not a.training and sum(p.numel() for p in a.parameters()) < 1_000_000
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.dtype == torch.float32 and torch.equal(p, q)


def test_calls_have_objects_of_their_own() -> None:
    first, second = (CASES["StableDiffusionInpaintPipeline"].call() for _ in range(2))
    assert first["image"] is not second["image"] and first["image"].tobytes() == second["image"].tobytes()


@pytest.mark.slow
def test_every_exported_pipeline_is_covered() -> None:
    """A new diffusers release names here what it adds. Slow: it imports every pipeline there is."""
    assert missing() == []
    assert not set(CASES) & (set(UNBUILDABLE) | set(absent()))
    assert {*CASES, *UNBUILDABLE, *ALWAYS_GUIDED, *NOT_RELOADABLE} <= set(exported())


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiTPipeline"])
def test_a_saved_pipeline_gives_the_same_image(name: str, tmp_path: Path) -> None:
    """Nothing that matters is outside of what diffusers saves."""

    def image(pipeline: Any) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**CASES[name].call(), num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images[0]

    pipeline = build(name)
    pipeline.save_pretrained(tmp_path)
    np.testing.assert_allclose(image(type(pipeline).from_pretrained(tmp_path)), image(pipeline), atol=1e-6)
