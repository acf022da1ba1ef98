"""Pairs of times (t, s) of flow maps: the jump is from t to s."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.matching.times import TimeLaw, Times, UnitInterval, draw_times
from distill.methods.base import strata
from distill.schedule import NoiseSchedule


class TimePairs(BaseModel):
    """Two draws of one law, sorted: t ≥ s. Some of the batch has s = t, where the map is the velocity that all else is built on."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    #: of both; its upper end is where sampling starts
    times: TimeLaw = (0.0, 1.0)
    diagonal: UnitInterval = 0.5  #: share of the batch with s = t
    interval: Annotated[float, Field(gt=0, le=1)] = 1.0  #: the longest jump t − s (Restricted MeanFlow's R)
    grow: UnitInterval = 0.0  #: share of the training in which the longest jump grows to that, from nothing
    to_data: UnitInterval = 0.0  #: share of the jumps that end at s = 0, as the last step of every sample does
    from_noise: UnitInterval = 0.0  #: share of those (of all jumps, if none) that start at the upper end, as one step does
    backward: UnitInterval = 0.0  #: share of the jumps that lead up, from s to t: for inversion
    #: M: jumps of the lengths high, high/2, … 2 high/M alone, between whole multiples of themselves (shortcut models)
    powers_of_two: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> TimePairs:
        if self.powers_of_two is not None:
            if math.log2(self.powers_of_two) % 1:
                raise ValueError(f"pairs.powers_of_two is one, 2, 4, 8, …, not {self.powers_of_two}")
            if self.to_data or self.from_noise or self.backward or self.interval < 1 or self.grow:
                raise ValueError("pairs.powers_of_two fixes the jumps: leave out interval, grow, to_data, from_noise and backward")
        if isinstance(self.times, Times) and (self.times.end is not None or self.times.scope is not None):
            raise ValueError("pairs.times is one law for all of the training: leave out end and scope, and use grow")
        return self

    @property
    def high(self) -> float:
        """Where sampling starts."""
        return self.times.high if isinstance(self.times, Times) else self.times[1]

    def on_diagonal(self, batch: int) -> int:
        """How many samples of a batch have s = t: the first ones."""
        return round(self.diagonal * batch)

    def draw(self, like: Tensor, schedule: NoiseSchedule, progress: float) -> tuple[Tensor, Tensor]:
        """(t, s), each (batch,), float64; no t below the schedule's own t_min."""
        one = draw_times(self.times, like, schedule)
        first, rest = self.on_diagonal(len(like)), len(like) - self.on_diagonal(len(like))
        if self.powers_of_two is not None:
            t, s = self._halvings(like[first:], self.powers_of_two)
        else:
            other = draw_times(self.times, like, schedule)
            t, s = torch.maximum(one, other)[first:], torch.minimum(one, other)[first:]
            to_data = self._some(self.to_data, rest, like)
            from_noise = self._some(self.from_noise, rest, like) & (to_data if self.to_data else torch.ones_like(to_data))
            t, s = torch.where(from_noise, self.high, t), torch.where(to_data, 0.0, s)
            s = torch.maximum(s, t - self.longest(progress))
            up = self._some(self.backward, rest, like)
            t, s = torch.where(up, s, t), torch.where(up, t, s)
        t = torch.cat([one[:first], t]).clamp_min(schedule.t_min)
        return t, torch.cat([t[:first], s])

    def longest(self, progress: float) -> float:
        """The longest jump, at this point of the training."""
        return self.interval * (1.0 if progress >= self.grow else progress / self.grow)

    def _some(self, share: float, count: int, like: Tensor) -> Tensor:
        return torch.rand(count, device=like.device) < share

    def _halvings(self, like: Tensor, finest: int) -> tuple[Tensor, Tensor]:
        """Jumps of lengths high · 2^−k, each k as often, from a multiple of the length down to the next."""
        levels = int(math.log2(finest))
        k = (strata(like) * levels).floor().clamp_max(levels - 1)
        pieces = 2**k
        index = (torch.rand(len(like), dtype=torch.float64, device=like.device) * pieces).floor() + 1
        return self.high * index / pieces, self.high * (index - 1) / pieces
