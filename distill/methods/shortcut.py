"""Shortcut models: a jump is two jumps of half its length; one training for every number of steps that is a power of two.

    Frans, Hafner, Levine, Abbeel 2024, "One Step Diffusion via Shortcut Models", arXiv 2410.12557

    U(x, t, t − d) = ½ [U(x, t, t − d/2) + U(x', t − d/2, t − d)],    x' = X(x, t → t − d/2);     d = 1, ½, … 2/M     (eq. 5; in tau's weights)

by the averaged weights, beside flow matching on real data. No derivative is taken. Here flow matching is told d = 0, and the shortest jumps
are two Euler steps of it. Other lengths than halvings are never trained: most_steps is a power of two. The paper, for long trainings: M = 128,
flow matching for 7/8 of the batch, decay 0.999.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.matching.time_pairs import TimePairs
from distill.methods.flow_map import FlowMap, Target


class Shortcut(FlowMap):
    """Shortcut models."""

    name: Literal["shortcut"] = "shortcut"  # type: ignore[assignment]
    target: Target = "progressive"
    velocity: Literal["teacher", "data", "own"] = "data"
    middle: Literal["uniform", "half"] = "half"
    network: Literal["stop_gradient", "ema"] = "ema"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    pairs: TimePairs = TimePairs(diagonal=0.5, powers_of_two=32)

    @model_validator(mode="after")
    def _trained(self) -> Shortcut:
        lengths = {2**k for k in range(self.pairs.powers_of_two.bit_length())} if self.pairs.powers_of_two is not None else None
        if lengths is not None and not {self.steps, self.most_steps} <= lengths:
            raise ValueError(f"steps and most_steps must be powers of two, at most pairs.powers_of_two ({self.pairs.powers_of_two}): no others are trained")
        return self
