"""PCM, phased consistency: to the lower edge of a phase in place of the data, so that several steps are a deterministic chain.

    Wang et al. 2024, arXiv 2405.18407 (NeurIPS 2024)

    f(x, t) = DDIM(x, D(x, t); t → e),   e the lower edge of t's phase,   L = d( f(x_t, t), sg f(x_s, s) ),   f(x_s, s) = x_s at s = e
    adversary (``gan: {…}``): both jumps, noised on from e within the phase; the real one is the *target's* jump, not the data's

With as many phases as steps a sample visits the edges and draws no noise: the same noise gives the same image, and no error of re-noising
adds up. The adversary vanishes at the solution, where one on real data would go on pulling. ``steps`` and ``segments`` belong together.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.losses.metrics import Metric
from distill.methods.consistency import Consistency


class PCM(Consistency):
    """Phased consistency distillation."""

    name: Literal["pcm"] = "pcm"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 4
    discretization: Annotated[tuple[int, int], Field()] = (48, 48)
    segments: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [4]  #: phases; sample in as many steps, or in a divisor of them badly
    metric: Metric = "pseudo_huber_elementwise"
    target: Literal["ema", "stop_gradient"] = "stop_gradient"

    @model_validator(mode="after")
    def _in_phases(self) -> PCM:
        if self.steps % self.segments[-1] and self.segments[-1] % self.steps:
            raise ValueError(f"{self.segments[-1]} phases and {self.steps} steps do not fit: one must divide the other")
        return self
