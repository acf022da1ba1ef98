"""TBCM: states that follow the teacher's own law, answers that are used twice, and what noised data do where the teacher is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from distill.analytic import GaussianMixture, gaussian
from distill.denoiser import Condition
from distill.mapping.points import Points, Trajectories, travelled
from distill.mapping.tangent import Tangent
from distill.methods.tbcm import TBCM
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.consistency import DATA
from distill.verify.core import Check, at_most
from distill.verify.scm import PLAIN, trained


def checks() -> Iterator[Check]:
    yield from marginal_checks()
    yield from reuse_checks()
    yield from teacher_checks()


def points_of(schedule: NoiseSchedule, steps: int, count: int = 4000, points: int | None = None) -> tuple[GaussianMixture, Points]:
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    return teacher, travelled(teacher, Trajectories(steps=steps, points=points), torch.randn(count, 2, dtype=torch.float64), Condition())


def spread_error(schedule: NoiseSchedule, steps: int) -> float:
    """The states' deviation from alpha µ over that of the exact law, minus one: the largest over the parts of [0, 1]."""
    teacher, points = points_of(schedule, steps)
    alpha, sigma = schedule.coefficients(points.x_t, points.t)
    z = (points.x_t - alpha * teacher.means) / ((alpha * teacher.stds) ** 2 + sigma**2).sqrt()
    return float((z.reshape(steps, -1, 2).square().mean((1, 2)).sqrt() - 1).abs().max())


def marginal_checks() -> Iterator[Check]:
    """The law of the states at each level is that of the exact ODE, but for the error of the teacher's own steps."""
    for schedule in (CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow()):
        yield at_most("tbcm", f"states of 32 steps: error of their deviation, {type(schedule).__name__}", spread_error(schedule, 32), 0.07)
    yield at_most("tbcm", "ablation: two steps", spread_error(Flow(), 2), 0.07, must_fail=True)


def reuse_checks() -> Iterator[Check]:
    """What the teacher said on its way is what it says there."""
    for points in (None, 3):
        teacher, found = points_of(Flow(), 8, 50, points)
        assert found.said is not None
        again = teacher(found.x_t, found.t)
        title = "all points" if points is None else f"{points} of 8 points"
        yield at_most("tbcm", f"answers of the trajectory against new ones, {title}", float((found.said - again).abs().max()), 0.0)


def deviation(method: Any) -> float:
    """Standard deviation of one-step samples over the teacher's, when the data are half as wide."""
    teacher, student = trained(Flow(), method, 700, 32 if method.trajectories is not None else 256, gaussian(Flow(), DATA[0], (0.3, 0.45)))
    with torch.no_grad():
        x = student(torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)), torch.tensor(1.0, dtype=torch.float64))
    return float((x.std(0) / teacher.stds[0]).mean())


def teacher_checks() -> Iterator[Check]:
    """A teacher that is twice as wide as the data: on its own trajectories the student learns the teacher's law. On noised data it meets
    states of another law; those of the largest samples, which the teacher would make, are rare among them."""
    mine = TBCM(trajectories=Trajectories(steps=8), tangent=Tangent(c=None, adaptive=False, data_std=0.8))
    yield at_most("tbcm", "data half as wide as the teacher: error of the student's deviation", abs(deviation(mine) - 1), 0.15)
    other = PLAIN.model_copy(update={"solver": "data"})
    yield at_most("tbcm", "ablation: points and velocities from the data", abs(deviation(other) - 1), 0.15, must_fail=True)
