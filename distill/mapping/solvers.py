"""One step of a trajectory from t to s < t: of the teacher's ODE, of its SDE, or on the line through a real sample and its noise."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.schedule import NoiseSchedule

Solver = Literal["ddim", "heun", "sde", "data"]


def straight_step(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """x_s on the line of (x0, noise): for the noise of x_t, E[x_s | x_t] is the step that the exact score takes, to second
    order in t − s (Song et al. 2023, theorem 2)."""
    return schedule.add_noise(x0, noise, s)


def solver_step(
    teacher: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, condition: Condition | None, solver: Literal["ddim", "heun"], x0: Tensor | None = None,
) -> Tensor:
    """One step of the teacher's PF-ODE from t to s < t: DDIM (first order; Euler where alpha = 1), or Heun's second-order
    step in the same coordinates (for alpha = 1 EDM's, Karras et al. 2022, alg. 1).

    Args:
        x0: what the teacher says at (x_t, t), where that is known.
    """
    x0 = teacher(x_t, t, condition) if x0 is None else x0
    x_s = teacher.schedule.ddim(x_t, x0, t, s)
    if solver == "ddim":
        return x_s
    # Slopes at both ends in EDM's coordinates (x/alpha, sigma/alpha): dx/dsigma = (x − D)/sigma. At sigma = 0 no slope is
    # defined, and at alpha = 0 (zero terminal SNR) the coordinates are not: the first-order step stands there.
    (alpha_t, sigma_t), (alpha_s, sigma_s) = teacher.schedule.coefficients(x_t, t), teacher.schedule.coefficients(x_t, s)
    x0_s = teacher(x_s, s.clamp_min(teacher.schedule.t_min), condition)
    y_t, y_s, level_t, level_s = x_t / alpha_t, x_s / alpha_s, sigma_t / alpha_t, sigma_s / alpha_s
    slope = 0.5 * ((y_t - x0) / level_t + (y_s - x0_s) / level_s.clamp_min(1e-12))
    second = alpha_s * (y_t + (level_s - level_t) * slope)
    usable = (level_s > 0) & (level_t < 1e4)
    return torch.where(usable, second.to(x_s), x_s)


def sde_step(
    teacher: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, condition: Condition | None, eta: float, substeps: int, x0: Tensor | None = None,
) -> Tensor:
    """The same way with noise of its own: dx = [f x − ½(1 + eta²) g² score] dt + eta g dW, in steps that are even in t (DDIM's family,
    Song et al. 2020, eq. 12 and 16: eta = 0 the ODE, eta = 1 the ancestral step).

        x_s = alpha_s D + √(sigma_s² − beta²) eps_hat + beta z,     beta = eta alpha_s (r_s/r_t) √(r_t² − r_s²),  r = sigma/alpha
    """
    schedule = teacher.schedule
    for i in range(substeps):
        a, b = t + (s - t) * (i / substeps), t + (s - t) * ((i + 1) / substeps)
        said = x0 if i == 0 and x0 is not None else teacher(x_t, a, condition)
        (alpha_a, sigma_a), (alpha_b, sigma_b) = schedule.coefficients(x_t, a), schedule.coefficients(x_t, b)
        fresh = eta**2 * sigma_b**2 * (1 - (sigma_b * alpha_a / (alpha_b * sigma_a)) ** 2).clamp_min(0)
        eps = (x_t - alpha_a * said) / sigma_a
        x_t = (alpha_b * said + (sigma_b**2 - fresh).clamp_min(0).sqrt() * eps + fresh.sqrt() * torch.randn_like(x_t)).to(x_t.dtype)
    return x_t


def jump(schedule: NoiseSchedule, x: Tensor, x0: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """Where an x0-prediction at (x, t) leads to at ``end`` ≤ t: x0 itself at 0, a DDIM step elsewhere, x where the end is t."""
    level = end.reshape((-1,) + (1,) * (x.dim() - 1))
    there = torch.where(level == 0, x0, schedule.ddim(x, x0, t.clamp_min(1e-6), end).to(x0))
    return torch.where(level >= t.reshape(level.shape), x.to(x0), there)
