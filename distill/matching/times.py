"""The law of the noise level t: uniform, logit-normal, or normal in log(sigma/alpha); fixed, or annealed over training.

    score_times: [0.02, 0.98]                                           uniform
    score_times: {law: logit_normal, mean: 0.0, std: 1.0}               (Esser et al. 2024, SD3)
    score_times: {law: log_sigma, mean: -1.2, std: 1.2}                 (Karras et al. 2022, EDM; Diff-Instruct)
    score_times: {low: 0.02, high: 0.98, end: [0.02, 0.5]}              uniform, narrowed linearly until the end of training
    score_times: {low: 0.02, high: 0.98, scope: {against: teacher}}     narrowed for samples that are near their goal (InstaRevive)
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.methods.base import strata
from distill.schedule import NoiseSchedule

UnitInterval = Annotated[float, Field(ge=0, le=1)]
Range = tuple[UnitInterval, UnitInterval]


class Scope(BaseModel):
    """A sample's own upper bound of t, from how far it is from its goal (InstaRevive: Zhu et al. 2025; the paper's loss is not public,
    this form is the guide's):

        t ≤ low + (high − low) min(d / d_ref, 1),        d the root mean square of x − goal, d_ref a running quantile of it.

    A sample that is nearly right is moved most wrongly by what high noise says of it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    #: the goal: what the teacher makes of the sample in the middle of the interval (one more pass), or the data's sample for its condition
    against: Literal["teacher", "data"] = "teacher"
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.9
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.99  #: decay of the running quantile

    def below(self, interval: Range, distance: Tensor, reference: Tensor) -> Tensor:
        """(batch,) upper bounds of t for (batch,) distances; the running quantile ``reference`` (0 at first) is updated in place."""
        now = torch.quantile(distance.detach().float(), self.quantile).to(reference)
        reference.copy_(torch.where(reference == 0, now, torch.lerp(now, reference, self.memory)))
        low, high = interval
        return low + (high - low) * (distance.double() / reference.double().clamp_min(1e-12)).clamp_max(1)


class Times(BaseModel):
    """A law of t on an interval."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    law: Literal["uniform", "logit_normal", "log_sigma"] = "uniform"
    low: UnitInterval = 0.0
    high: UnitInterval = 1.0
    mean: float = 0.0  #: of logit t, or of log(sigma/alpha)
    std: Annotated[float, Field(gt=0)] = 1.0
    end: Range | None = None  #: the interval at the end of training; it moves there linearly
    scope: Scope | None = None  #: of the score difference: narrower for samples that are near their goal

    @model_validator(mode="after")
    def _ordered(self) -> Times:
        for low, high in ((self.low, self.high), self.end or (0.0, 1.0)):
            if low > high:
                raise ValueError(f"the lower bound of t, {low:g}, lies above the upper one, {high:g}")
        return self

    def interval(self, progress: float) -> Range:
        """(low, high) at this point of the training."""
        if self.end is None:
            return self.low, self.high
        return tuple(a + (b - a) * progress for a, b in zip((self.low, self.high), self.end, strict=True))  # type: ignore[return-value]


TimeLaw = Range | Times


def draw_times(
    law: TimeLaw, like: Tensor, schedule: NoiseSchedule, progress: float = 0.0, above: Tensor | None = None, below: Tensor | None = None
) -> Tensor:
    """t of one draw per sample, (batch,), float64, stratified over the batch.

    Args:
        above: (batch,) levels that the samples are at already: t lies above them, as no noise can be taken away.
        below: (batch,) upper bounds of their own.
    """
    times = Times(low=law[0], high=law[1]) if isinstance(law, tuple) else law
    bounds = times.interval(progress)
    low, high = (torch.full((len(like),), b, dtype=torch.float64, device=like.device) for b in bounds)
    if above is not None:
        low = torch.maximum(low, above.to(low))
        high = torch.maximum(high, low)
    if below is not None:
        high = torch.maximum(torch.minimum(high, below.to(high)), low)
    u = strata(like)
    if times.law == "uniform":
        return low + (high - low) * u

    def level(t: Tensor) -> Tensor:
        return torch.logit(t) if times.law == "logit_normal" else -0.5 * schedule.log_snr(t)

    # The normal law, cut to the interval: u is uniform between the bounds' own quantiles.
    tails = [torch.special.ndtr((level(t) - times.mean) / times.std) for t in (low, high)]
    wanted = times.mean + times.std * torch.special.ndtri(tails[0] + (tails[1] - tails[0]) * u)
    if times.law == "logit_normal":
        return torch.sigmoid(wanted).clamp(low, high)
    for _ in range(50):  # log(sigma/alpha) grows with t: bisection, on any schedule
        middle = (low + high) / 2
        over = level(middle) > wanted
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2


def scope_of(law: TimeLaw) -> Scope | None:
    """How it is narrowed for each sample."""
    return law.scope if isinstance(law, Times) else None
