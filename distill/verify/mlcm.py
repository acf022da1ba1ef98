"""MLCM: states that have had enough of the teacher's steps, and segments that merge."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distill.analytic import MLPDenoiser, gaussian
from distill.denoiser import Condition
from distill.mapping.points import Trajectories
from distill.methods.base import Batch
from distill.methods.mlcm import MLCM
from distill.roles import Roles
from distill.sampling import renoise_sample
from distill.schedule import CosineVP
from distill.verify.consistency import DATA
from distill.verify.core import Check, at_most, train


def checks() -> Iterator[Check]:
    yield from state_checks()
    yield from trained_checks()


def low_state_error(steps: int, level: float = 0.25) -> float:
    """Error of the deviation of the states at a low level of noise, over the exact one, when trajectories have so many steps."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), *DATA)
    method = MLCM(trajectories=Trajectories(steps=steps))
    points = method._points(Roles(teacher, teacher), Batch(torch.randn(2000, 2, dtype=torch.float64), Condition()))
    low = points.t <= level
    alpha, sigma = teacher.schedule.coefficients(points.x_t[low], points.t[low])
    z = (points.x_t[low] - alpha * teacher.means) / ((alpha * teacher.stds) ** 2 + sigma**2).sqrt()
    return float((z.square().mean().sqrt() - 1).abs())


def state_checks() -> Iterator[Check]:
    yield at_most("mlcm", "states below t = 0.25, 32 of the teacher's steps: error of their deviation", low_state_error(32), 0.05)
    yield at_most("mlcm", "ablation: two steps, whose error the student would inherit", low_state_error(2), 0.05, must_fail=True)


def chain_error(calls: int, method: MLCM, steps: int, batch: int = 64) -> float:
    """RMS of a trained student's deterministic samples against the exact map, over the data's deviation."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), *DATA)
    student = MLPDenoiser(CosineVP(), 2, width=64, data_std=0.8)
    kept = train(method, Roles(teacher, student), lambda step: Batch(torch.randn(batch, 2), Condition()), steps, {"student": 4e-3}, average=0.99)
    noise, one = torch.randn(4000, 2), torch.ones(4000, dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(student.parameters(), kept, strict=True):
            p.copy_(value)
        made = renoise_sample(student, method.sampler().ladder(calls), noise, None, gamma=0.0)
    exact = teacher.flow_map(noise, one, 0 * one)
    return float((made - exact).square().mean().sqrt() / (exact - exact.mean(0)).square().mean().sqrt())


def trained_checks() -> Iterator[Check]:
    """No images: two segments at the end, two deterministic calls; eight segments all along are right for eight calls, and not for two."""
    merged = MLCM(discretization=(32, 32), solver="heun", segments=[8, 4, 2, 2])
    yield at_most("mlcm", "two calls after segments have merged, against the exact map", chain_error(2, merged, 1200), 0.1)
    apart = MLCM(discretization=(32, 32), solver="heun", segments=[8])
    yield at_most("mlcm", "ablation: eight segments all along", chain_error(2, apart, 600), 0.1, must_fail=True)
