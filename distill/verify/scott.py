"""SCott: the SDE's fixed point, and what its noise costs without the adversary."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from distill.analytic import gaussian
from distill.denoiser import Condition
from distill.mapping.solvers import sde_step, solver_step
from distill.methods import consistency as rule
from distill.methods.base import Batch
from distill.methods.scott import SCott
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.consistency import LinearOnGrid
from distill.verify.core import Check, at_most, between, replaced


def checks() -> Iterator[Check]:
    yield from step_checks()
    yield from fixed_point_checks()


def law_error(schedule: NoiseSchedule, eta: float, steps: int = 64) -> float:
    """The deviation of x_s after a chain of steps from x_t, over the exact law's, minus one; and its mean's error."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, (0.5,), (0.6,))
    times = torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64)[:, None].expand(-1, 20_000)
    x = schedule.add_noise(teacher.sample(20_000).double(), torch.randn(20_000, 1, dtype=torch.float64), times[0])
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = sde_step(teacher, x, t, s, None, eta, 1)
    alpha, sigma = schedule.coefficients(x, times[-1])
    deviation = ((alpha * 0.6) ** 2 + sigma**2).sqrt()
    z = (x - alpha * 0.5) / deviation
    return max(abs(float(z.std()) - 1), abs(float(z.mean())))


def step_checks() -> Iterator[Check]:
    """Every eta keeps the marginals; eta = 0 is DDIM."""
    for schedule in (CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow()):
        for eta in (0.5, 1.0):
            yield at_most("scott", f"law after 64 steps of the SDE, eta {eta:g}, {type(schedule).__name__}: error", law_error(schedule, eta), 0.05)
    teacher, t = gaussian(Flow(), (0.5,), (0.6,)), torch.full((64,), 0.7, dtype=torch.float64)
    x = torch.randn(64, 1, dtype=torch.float64)
    apart = (sde_step(teacher, x, t, t - 0.1, None, 0.0, 1) - solver_step(teacher, x, t, t - 0.1, None, "ddim")).abs().max()
    yield at_most("scott", "eta 0 against DDIM", float(apart), 1e-12)


def one_step_ratio(eta: float, intervals: int = 64, std: float = 0.6, samples: int = 128) -> float:
    """The linear student's deviation at t = 1 over the exact map's, at the fixed point of the method's own step with a squared distance
    (as ``consistency.finite_grid_ratio``)."""
    torch.manual_seed(0)
    schedule = EDM(0.002, 80.0, 7.0)
    teacher = gaussian(schedule, (0.0,), (std,))
    method = SCott(discretization=(intervals, intervals), steps=1, eta=eta, metric="l2", target="stop_gradient", gan=None)
    slopes = torch.zeros(intervals + 1, dtype=torch.float64)
    slopes[0] = 1.0
    student = LinearOnGrid(schedule, slopes)
    quantiles = torch.special.ndtri((torch.arange(samples, dtype=torch.float64) + 0.5) / samples)
    first = quantiles / quantiles.std(correction=0)
    x0, noise = (g.reshape(-1, 1) for g in torch.meshgrid(first, first, indexing="ij"))

    def without_chance(x: torch.Tensor) -> torch.Tensor:
        """A normal draw of each sample whose moment with x is zero exactly."""
        z = drawn(x)
        return z - x * (z * x).mean() / x.square().mean()

    drawn = torch.randn_like
    for i in range(intervals):
        with replaced(rule, "snapped", lambda t, n, i=i: torch.full_like(t, (i + 1) / n)), replaced(torch, "randn_like", without_chance):
            _, loss, _ = next(iter(method.step(Roles(teacher, student), Batch(noise, Condition(), x0 * std))))
        (gradient,) = torch.autograd.grad(loss, student.slopes, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient[i + 1], student.slopes)
        with torch.no_grad():
            student.slopes[i + 1] -= gradient[i + 1] / curvature[i + 1]
    return float(student.slopes[-1].detach()) / (std / math.sqrt(std**2 + 80.0**2))


def fixed_point_checks() -> Iterator[Check]:
    """(s²/(s² + T²))^((1 + eta²)/2) in place of its root: in the exact map's deviations (s²/(s² + T²))^(eta²/2)."""
    for eta in (0.25, 0.5):
        wanted = (0.36 / (0.36 + 80.0**2)) ** (eta**2 / 2)
        value = one_step_ratio(eta)
        yield between("scott", f"one-step deviation at eta {eta:g}, over the ODE map's (closed form {wanted:.3f})", value / wanted, 0.9, 1.1)
    collapsed = one_step_ratio(1.0)
    yield at_most("scott", "eta 1, squared distance, no adversary: the posterior mean's deviation, over the ODE map's", collapsed, 0.02)
    yield between("scott", "ablation: eta 1 read as the ODE's map", collapsed, 0.9, 1.1, must_fail=True)
