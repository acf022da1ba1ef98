"""iCT: its distance, its law of intervals, and why the target must be the student itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.analytic import GaussianMixture, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.losses.metrics import pseudo_huber
from distill.mapping.pairs import noise_ratio, snapped
from distill.matching.times import TimeLaw, draw_times
from distill.methods.base import Batch
from distill.methods.ict import ICT
from distill.roles import Roles
from distill.schedule import EDM, Kind
from distill.verify.core import Check, at_most, train


def checks() -> Iterator[Check]:
    yield from distance_checks()
    yield from law_checks()
    yield from target_checks()


def distance_checks() -> Iterator[Check]:
    """√(‖·‖² + c²) − c is the norm for small c and its square over 2c for large; c is 0.03 for CIFAR's 3072 numbers."""
    a = torch.randn(16, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size = a.flatten(1).norm(dim=1)
    small, large = (pseudo_huber(a, 0 * a, c) * math.sqrt(3072) for c in (1e-6, 1e6))
    yield at_most("ict", "pseudo-Huber at small c, over the norm: error", float((small / size - 1).abs().max()), 1e-5)
    yield at_most("ict", "pseudo-Huber at large c, over the square / 2c: error", float((large / (size**2 / 2e6) - 1).abs().max()), 1e-3)
    own = pseudo_huber(a, 0 * a) * math.sqrt(3072)
    c = 0.00054 * math.sqrt(3072)  # = 0.0299
    yield at_most("ict", "the default against √(‖·‖² + 0.03²) − 0.03: error", float((own - ((size**2 + c**2).sqrt() - c)).abs().max()), 1e-9)


def law_error(law: TimeLaw, n: int = 20, draws: int = 20_000) -> float:
    """Largest error of the shares of the n intervals, against iCT's erf law on EDM's grid, in shares."""
    schedule = EDM()
    t = snapped(draw_times(law, torch.empty(draws), schedule), n)
    found = torch.bincount((t * n).round().long() - 1, minlength=n) / draws
    level = noise_ratio(schedule, torch.arange(n + 1, dtype=torch.float64) / n)
    level[0] = schedule.sigma(torch.tensor(0.0))
    below = torch.erf((level.log() + 1.1) / (math.sqrt(2) * 2.0))
    wanted = (below[1:] - below[:-1]) / (below[-1] - below[0])
    return float((found - wanted).abs().max())


def law_checks() -> Iterator[Check]:
    yield at_most("ict", "shares of the intervals against the erf law, largest error", law_error(ICT().train_times), 1e-3)
    yield at_most("ict", "ablation: even shares", law_error((0.0, 1.0)), 1e-3, must_fail=True)


class OneNumber(Denoiser):
    """f(x, t) = (s/sigma) x + (1 − s/sigma) θ, s the least noise level: exact at θ = ξ for data that are all ξ."""

    kind: Kind = "x0"

    def __init__(self, schedule: EDM) -> None:
        self.schedule, self.number = schedule, nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.least = schedule.sigma(torch.zeros(1))

    def parameters(self) -> list[nn.Parameter]:
        return [self.number]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: object = ()) -> Prediction:
        share = self.least / self.schedule.sigma(t.expand(len(x_t)))[:, None]
        return Prediction(share * x_t + (1 - share) * self.number, "x0", x_t, t, self.schedule)


def bias(target: str, decay: float, steps: int = 300) -> float:
    """|θ − 1| for data that are all 1, at 1281 grid points."""
    torch.manual_seed(0)
    schedule = EDM()
    teacher: GaussianMixture = gaussian(schedule, (1.0,), (1.0,))
    student, kept = OneNumber(schedule), OneNumber(schedule)
    method = ICT(discretization=(1280, 1280), target=target, ema_decay=decay, metric="l2", weighting="uniform", train_times=(0.0, 1.0))  # type: ignore[arg-type]

    def draw(step: int) -> Batch:
        return Batch(torch.randn(256, 1, dtype=torch.float64), Condition(), torch.ones(256, 1, dtype=torch.float64))

    train(method, Roles(teacher, student, target=kept), draw, steps, {"student": 0.02}, betas=(0.0, 0.9))
    return float((student.number - 1).detach().abs())


def target_checks() -> Iterator[Check]:
    """With a target that lags, two neighbours differ by the lag and not by the gap, however fine the grid: nothing drives θ on."""
    yield at_most("ict", "data that are one point, 1281 levels: error of the student", bias("stop_gradient", 0.0), 0.02)
    yield at_most("ict", "ablation: an averaged target, decay 0.95", bias("ema", 0.95), 0.02, must_fail=True)
