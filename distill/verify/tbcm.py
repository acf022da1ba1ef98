"""TBCM: states that follow the teacher's own law, answers that are used twice, and what noised data do where the teacher is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distill.analytic import GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition
from distill.mapping.points import Points, Trajectories, travelled
from distill.mapping.tangent import Tangent
from distill.methods.base import Batch
from distill.methods.consistency import Consistency
from distill.methods.scm import SCM
from distill.methods.tbcm import TBCM
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.consistency import DATA
from distill.verify.core import Check, at_most, train


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


PLAIN_TANGENT = Tangent(c=None, adaptive=False, data_std=0.8)  #: see ``scm.PLAIN``
TWO = GaussianMixture(Flow(), torch.tensor([[1.2, 0.0], [-1.2, 0.0]]), torch.full((2, 1), 0.3))  #: the teacher
ONE = GaussianMixture(Flow(), torch.tensor([[1.2, 0.0]]), torch.full((1, 1), 0.3))  #: the data, which lack one of its modes


def between_modes(method: Consistency, batch: int, steps: int = 700) -> float:
    """Share of one-step samples more than three deviations from each of the teacher's modes."""
    torch.manual_seed(0)
    student = MLPDenoiser(Flow(), 2, width=64, data_std=1.2)
    roles = Roles(TWO, student)
    kept = train(method, roles, lambda step: Batch(torch.randn(batch, 2), Condition(), ONE.sample(batch)), steps, {"student": 4e-3}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), kept, strict=True):
            p.copy_(value)
        x = student(torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)), torch.tensor(1.0, dtype=torch.float64))
    return float((torch.cdist(x.double(), TWO.means).min(1).values > 0.9).double().mean())


def teacher_checks() -> Iterator[Check]:
    """A teacher with a mode that the data lack: noised data never lie where its trajectories to that mode pass, and the student, asked
    there, has learnt nothing."""
    mine = TBCM(trajectories=Trajectories(steps=8), tangent=PLAIN_TANGENT)
    yield at_most("tbcm", "a mode that the data lack: share of one-step samples between the teacher's modes", between_modes(mine, 32), 0.2)
    noised = SCM(tangent=PLAIN_TANGENT, train_times=(0.0, 1.0))
    yield at_most("tbcm", "ablation: noised data in the trajectories' place, the teacher's velocity", between_modes(noised, 256), 0.2, must_fail=True)
