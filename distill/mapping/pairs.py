"""Which two times t > s of one trajectory are compared, with what weight, and to which end e ≤ s both are taken.

    grid        t = i/N, s = (i − 1)/N, N doubled over training (Song & Dhariwal 2023, iCT, sec. 3.4); i by the mass of a law of noise levels
    continuous  r(s) = r(t) (1 − q^−(stage + 1) n(r)),  n(r) = 1 + k sigmoid(−b r),  r = sigma/alpha (Geng et al. 2024, ECT, sec. 4)
    segments    e: the lower edge of the t's segment of [0, 1] (Wang et al. 2024, PCM), or any time between it and s (Ren et al. 2024, TSCD)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.schedule import NoiseSchedule

Weighting = Literal["uniform", "inverse_gap", "inverse_noise"]
End = Literal["edge", "random"]


class Gap(BaseModel):
    """ECT's gap: at first s = 0 for most t, which is plain denoising; each stage divides what is left between s and t by q."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    base: Annotated[float, Field(gt=1)] = 2.0  #: q
    k: Annotated[float, Field(ge=0)] = 8.0
    b: Annotated[float, Field(gt=0)] = 1.0
    stages: Annotated[int, Field(ge=1)] = 8  #: of equal length
    closest: Annotated[float, Field(gt=0, lt=1)] = 0.999  #: r(s)/r(t) at most

    def stage(self, progress: float) -> int:
        return min(int(progress * self.stages), self.stages - 1)

    def below(self, ratio: Tensor, progress: float) -> Tensor:
        """r(s) for r(t), (batch,)."""
        n = 1 + self.k * torch.sigmoid(-self.b * ratio)
        share = 1 - n * self.base ** -(self.stage(progress) + 1)
        return ratio * share.clamp(0, self.closest)


@dataclass(frozen=True)
class Pair:
    """Times of each sample, (batch,), float64: t > s ≥ e; and the weight of its distance."""

    t: Tensor
    s: Tensor
    end: Tensor
    weight: Tensor


def noise_ratio(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma/alpha, at most 1e4 where alpha is (nearly) zero, and zero at the data."""
    ratio = schedule.sigma(t) / schedule.alpha(t).clamp_min(1e-4)
    return torch.where(t == 0, 0.0, ratio)


def time_of(schedule: NoiseSchedule, ratio: Tensor) -> Tensor:
    """The inverse: t with sigma/alpha = ratio, by bisection; 0 below the least ratio."""
    low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
    for _ in range(50):
        middle = (low + high) / 2
        over = noise_ratio(schedule, middle) > ratio
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return torch.where(low < 1e-12, 0.0, high)


def intervals(discretization: tuple[int, int], progress: float) -> int:
    """N: doubled at equal spans of training from the first to the last value (iCT, sec. 3.4)."""
    first, last = discretization
    doublings = math.ceil(math.log2(last / first))
    return min(first << int(progress * (doublings + 1)), last)


def snapped(t: Tensor, n: int) -> Tensor:
    """t rounded up to the grid of n intervals. A law of t becomes one of intervals: each has the mass that lies in it."""
    return (t * n - 1e-9).ceil().clamp(1, n) / n


def segment_count(segments: list[int], progress: float) -> int:
    """How many segments there are now; each entry holds for an equal span of training."""
    return segments[min(int(progress * len(segments)), len(segments) - 1)]


def segment_end(t: Tensor, s: Tensor, count: int, kind: End) -> Tensor:
    """e for a pair within one of ``count`` equal segments: its lower edge, or U[edge, s]."""
    edge = ((t * count - 1e-6).ceil() - 1).clamp_min(0) / count
    return edge if kind == "edge" else edge + (s - edge).clamp_min(0) * torch.rand_like(s)


def interval_weights(weighting: Weighting, schedule: NoiseSchedule, n: int, device: torch.device | None = None) -> Tensor:
    """w of the n intervals of the even grid, (n,), with mean 1; in terms of the noise-to-signal ratio r(t) = sigma/alpha:

    ``uniform`` 1; ``inverse_gap`` 1/(r(t) − r(s)) (iCT, sec. 3.4); ``inverse_noise`` r(t)^(−1/2), at most 4. A distance between
    x0-predictions is r times one between the network's own outputs, so that without a weight the loss is all about the
    noisiest intervals, and the errors of the last ones, which every further step adds anew, hardly count.
    """
    ratio = noise_ratio(schedule, torch.arange(n + 1, dtype=torch.float64, device=device) / n)
    weights = gap_weights(weighting, ratio[1:], ratio[:-1])
    return weights / weights.mean()


def gap_weights(weighting: Weighting, above: Tensor, below: Tensor) -> Tensor:
    """The same for any pairs of ratios, not normalised."""
    if weighting == "uniform":
        return torch.ones_like(above)
    return 1 / (above - below) if weighting == "inverse_gap" else above.rsqrt().clamp_max(4.0)
