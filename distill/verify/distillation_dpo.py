"""Distillation-DPO in one dimension, where the laws of winners and losers are known: skew normals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.analytic import AffineGenerator, ExactCritic, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.matching.objectives import injected
from distill.methods.base import Batch
from distill.methods.distillation_dpo import DistillationDPO
from distill.roles import Roles
from distill.schedule import CosineVP, Kind
from distill.verify.core import Check, at_most, descend, student_loss

TIME = 0.4
LARGER = f"{__name__}:larger"


def larger(images: Tensor, inputs: Sequence[Any]) -> Tensor:
    """A metric that likes larger numbers."""
    return images.flatten(1).mean(1)


def log_ndtr_slope(u: Tensor) -> Tensor:
    """φ(u)/Φ(u)."""
    return torch.exp(-0.5 * u**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(u))


class ExactRanked(Denoiser):
    """The denoiser of the larger (or smaller) of two samples m + s z.

    Their law is skew normal, x = m ± s (|u| + v)/√2 with unit normals u, v, and stays so under noise: with ω² = alpha² s² + sigma²
    and d = alpha s/(√2 ω), the slant is l = d/√(1 − d²) and the score (±l φ/Φ(±l z) − z)/ω at z = (x_t − alpha m)/ω.
    """

    kind: Kind = "x0"

    def __init__(self, generator: AffineGenerator, sign: float) -> None:
        self.generator, self.schedule, self.sign = generator, generator.schedule, sign

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        mean, std = self.generator.mean.detach(), self.generator.std.detach().abs()
        t = t.expand(len(x_t))
        alpha, sigma = self.schedule.coefficients(x_t.double(), t)
        omega = ((alpha * std) ** 2 + sigma**2).sqrt()
        z, slant = (x_t.double() - alpha * mean) / omega, self.sign * slant_of(alpha * std / omega)
        score = (slant * log_ndtr_slope(slant * z) - z) / omega
        return Prediction(((x_t + sigma**2 * score) / alpha).to(x_t.dtype), "x0", x_t, t, self.schedule)


def slant_of(share: Tensor) -> Tensor:
    """l for alpha s/ω."""
    d = share / math.sqrt(2)
    return d / (1 - d**2).sqrt()


def resting_point(beta: float) -> tuple[float, float]:
    """(mean, standard deviation) of the student beside a teacher N(0, 1), at one noise level: with z ~ N(0, 1) and h = φ/Φ,

        alpha m = beta (l/ω) E[h(l z)],      ω² = 1 + beta l E[z h(l z)]      (l depends on s: iterated)
    """
    alpha, sigma = CosineVP().alpha_sigma(torch.tensor(TIME, dtype=torch.float64))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))
    omega = torch.ones((), dtype=torch.float64)
    for _ in range(100):
        std = ((omega**2 - sigma**2) / alpha**2).sqrt()
        slant = slant_of(alpha * std / omega)
        h = log_ndtr_slope(slant * z)
        omega = (1 + beta * slant * (w * z * h).sum()).sqrt()
    return float(beta * slant / omega * (w * h).sum() / alpha), float(std)


def published(student: AffineGenerator, x: Tensor, x_t: Tensor, t: Tensor, beta: float) -> Tensor:
    """The paper's gradient on samples, of which the first half is compared with the second."""
    first, second = x.detach().chunk(2)
    wins = torch.cat([first > second, second >= first])
    teacher = gaussian(student.schedule, (0.0,), (1.0,))(x_t, t)
    gaps = [ExactRanked(student, sign)(x_t, t) - teacher for sign in (1.0, -1.0)]
    return torch.where(wins, gaps[0], -beta * gaps[1])


def rest(method: DistillationDPO, ranked: bool = True, steps: int = 150, batch: int = 2048) -> tuple[float, float]:
    """(mean, standard deviation) to which the student goes with exact critics of its samples and of its winners."""
    torch.manual_seed(0)
    schedule = CosineVP()
    student = AffineGenerator(schedule, (0.0,), (1.0,))
    critic = ExactCritic(student)
    winner = ExactRanked(student, 1.0) if ranked else critic
    roles = Roles(gaussian(schedule, (0.0,), (1.0,)), student, critic, winner=winner, decode=lambda x: x)

    def loss() -> Tensor:
        return student_loss(method, roles, Batch(torch.randn(batch, 1, dtype=torch.float64), Condition()))

    return descended(student, loss, steps)


def descended(student: AffineGenerator, loss: Callable[[], Tensor], steps: int) -> tuple[float, float]:
    descend(student.parameters(), loss, steps, 0.05, (0.5, 0.99))
    return float(student.mean.detach()), float(student.std.detach().abs())


def published_drift(beta: float, cancelled: bool = False) -> float:
    """Where 60 steps of the paper's gradient take the mean.

    Args:
        cancelled: as its public code has it, times x_t − x.
    """
    torch.manual_seed(0)
    student = AffineGenerator(CosineVP(), (0.0,), (1.0,))
    t = torch.full((4096,), TIME, dtype=torch.float64)

    def loss() -> Tensor:
        x = student.mean + student.std * torch.randn(4096, 1, dtype=torch.float64)
        noise = torch.randn_like(x)
        if cancelled:  # there x_t = x + sigma noise
            return (published(student, x, student.schedule.add_noise(x, noise, t).detach(), t, beta) * ((x + noise) - x)).mean() + 0 * x.sum()
        return injected(x, published(student, x, student.schedule.add_noise(x, noise, t).detach(), t, beta).detach())

    return descended(student, loss, 60)[0]


def checks() -> Iterator[Check]:
    """The resting point in closed form, and what leads elsewhere."""
    settings: dict[str, Any] = {"weighting": "exact", "score_times": (TIME, TIME), "metric": LARGER}

    def miss(found: tuple[float, float], beta: float) -> float:
        return max(abs(a - b) for a, b in zip(found, resting_point(beta), strict=True))

    for beta in (0.5, 1.0):
        found, wanted = rest(DistillationDPO(**settings, beta=beta)), resting_point(beta)
        title = f"beta {beta:g}: mean {found[0]:.3f}, deviation {found[1]:.3f} (closed form {wanted[0]:.3f}, {wanted[1]:.3f}): error"
        yield at_most("distillation_dpo", title, miss(found, beta), 0.02)
    found = rest(DistillationDPO(**settings | {"metric": None}, beta=1.0), ranked=False)
    yield at_most("distillation_dpo", f"ablation: ranked at random, mean {found[0]:.3f}: error", miss(found, 1.0), 0.02, must_fail=True)
    yield at_most("distillation_dpo", "ablation: the paper's gradient: how far it takes the mean the other way", -published_drift(0.5), 0.0, must_fail=True)
    yield at_most("distillation_dpo", "the public code's form of it: how far it takes the mean", abs(published_drift(0.5, cancelled=True)), 1e-6)
