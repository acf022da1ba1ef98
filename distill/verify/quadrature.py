"""Objectives of score differences against autograd of their divergence by quadrature, at one noise level.

What ``step`` yields for an affine student, with exact networks and quasi-random noise, has hardly any sampling error; the divergence
is an integral over a line, differentiable in the student's mean and width. So the two agree to four digits or so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.analytic import AffineGenerator, ExactCritic, ExactRatio, GaussianMixture
from distill.denoiser import Condition
from distill.losses.divergence import find_weight
from distill.methods.base import Batch
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.core import replaced
from distill.verify.dmd2 import STUDENT, close_modes, independent_normals

#: schedule → the noise level of the checks, near log-SNR 0
LEVELS: dict[str, tuple[NoiseSchedule, float]] = {
    "CosineVP": (CosineVP(), 0.55), "EDM": (EDM(sigma_max=10.0), 0.566), "Flow": (Flow(), 0.55),
}  # fmt: skip
COUNT = 2**15


def expectation(
    teacher: GaussianMixture, student: GaussianMixture, t: float, divergence: str = "reverse_kl", frozen: bool = False, c: float | None = None,
) -> Tensor:
    """E_q h(r) ‖s_p − s_q‖² at one noise level in one dimension, differentiable in the student.

    Args:
        frozen: the law under the expectation stands still (its scores do not).
        c: the pseudo-Huber distance of D_T − D_F in place of the squared norm, times 2 (alpha/sigma²)²: the same limit.
    """
    schedule, time = teacher.schedule, torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(time)
    width = 12 * float(alpha + sigma)
    x = torch.linspace(-width, width, 20001, dtype=torch.float64)[:, None]
    log_p, log_q = teacher.log_density(x, time), student.log_density(x, time)
    gap = teacher.predict(x, time).x0 - student.predict(x, time).x0
    size = gap.square().sum(1) if c is None else 2 * ((gap.square().sum(1) + c**2).sqrt() - c)
    h = find_weight(divergence)((log_p - log_q).clamp(-60, 60).exp()) if divergence != "reverse_kl" else 1.0
    density = (log_q.detach() if frozen else log_q).exp()
    return torch.trapezoid(density * h * (alpha / sigma**2) ** 2 * size, x[:, 0])


def gradient_of(value: Tensor, generator: AffineGenerator) -> Tensor:
    """Its gradient in (mean, width)."""
    return torch.cat(torch.autograd.grad(value, generator.parameters()))


def truth(schedule: NoiseSchedule, t: float, divergence: str = "reverse_kl", frozen: bool = False, c: float | None = None) -> Tensor:
    """Gradient of ``expectation`` for the checks' student and teacher."""
    generator = AffineGenerator(schedule, *STUDENT)
    return gradient_of(expectation(close_modes(schedule), generator.law(), t, divergence, frozen, c), generator)


def yielded(
    method: DistributionMatching, schedule: NoiseSchedule, teacher: GaussianMixture | None = None, generator: AffineGenerator | None = None,
) -> Tensor:
    """Gradient in (mean, width) of the student's loss that one ``step`` yields, with exact critic and ratio."""
    generator = generator or AffineGenerator(schedule, *STUDENT)
    teacher = teacher or close_modes(schedule)
    roles = Roles(teacher, generator, ExactCritic(generator), discriminator=ExactRatio(teacher, generator))  # type: ignore[arg-type]
    z, noise = independent_normals(COUNT)
    with replaced(torch, "randn_like", lambda x: noise):
        _, loss, _ = next(iter(method.step(roles, Batch(z, Condition(), z))))
    return gradient_of(loss, generator)
