"""Truncated consistency: a second stage that learns the high noise levels alone (Lee et al. 2024, TCM, arXiv 2410.14895).

A one-step sample asks the student at t = 1 only, and yet most of what a consistency model learns is how to denoise small t. From
``start`` on the student of the first stage is frozen as the target below t = ``level``, and pairs are drawn above it:

    L = E_{t > level} d(f(x_t, t), sg f⁻(x_s, s)) + w E_{t just above level} d(f(x_t, t), f_frozen(x_s, s)),   f⁻ = f_frozen where s ≤ level

Without the second part nothing ties the map to the data, and it collapses.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Truncation(BaseModel):
    """The second stage."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    level: Annotated[float, Field(gt=0, lt=1)] = 0.4  #: t' (the paper's is sigma = 1 in units of the data's deviation 0.5: sigma/alpha = 2)
    start: Annotated[float, Field(ge=0, lt=1)] = 0.5  #: part of the training after which it begins
    boundary: Annotated[float, Field(ge=0, lt=1)] = 0.25  #: share of the batch at the boundary
    weight: Annotated[float, Field(ge=0)] = 0.1  #: of their loss

    def at_boundary(self, count: int) -> int:
        """How many samples of a batch lie there: its first ones."""
        return round(self.boundary * count)

    def combined(self, distance: Tensor) -> Tensor:
        """(batch,) → scalar: the two parts' means, weighted."""
        edge = self.at_boundary(len(distance))
        inside = distance[edge:].mean()
        return inside + self.weight * distance[:edge].mean() if edge else inside

    def moved(self, t: Tensor, step: float) -> Tensor:
        """Times with the first ones at the boundary: the least time above the level, ``step`` away from it."""
        edge = self.at_boundary(len(t))
        return torch.cat([torch.full_like(t[:edge], self.level + step), t[edge:]])
