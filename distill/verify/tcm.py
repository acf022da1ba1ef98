"""TCM: the frozen first stage below t', which the second one inherits, and the boundary without which it collapses."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distill.analytic import ExactMap, GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.mapping.truncation import Truncation
from distill.methods.base import Batch
from distill.methods.tcm import TCM
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.consistency import DATA
from distill.verify.core import Check, at_most, between, student_loss, train


def checks() -> Iterator[Check]:
    yield from stage_checks()
    yield from boundary_checks()


class Scaled(ExactMap):
    """A first stage that is wrong: the exact map times a factor."""

    def __init__(self, teacher: GaussianMixture, factor: float) -> None:
        super().__init__(teacher)
        self.factor = factor

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition | None = None, features: object = ()) -> Prediction:
        said = super().predict(x_t, t, condition)
        return Prediction(self.factor * said.x0, "x0", x_t, t.expand(len(x_t)), self.schedule)


def loss_with(first: Denoiser, second: Denoiser, progress: float, teacher: GaussianMixture) -> float:
    torch.manual_seed(0)
    batch = Batch(torch.randn(2000, 2, dtype=torch.float64), Condition(), teacher.sample(2000).double(), progress)
    method = TCM(metric="l2", gap=None, discretization=(256, 256), train_times=(0.0, 1.0), weighting="uniform")
    return float(student_loss(method, Roles(teacher, second, target=first), batch).detach())


def stage_checks() -> Iterator[Check]:
    """Where the first stage is 1.1 times the map, the second one is at rest at 1.1 times the map too, and not at the map."""
    teacher = gaussian(CosineVP(), *DATA)
    first = Scaled(teacher, 1.1)
    inherited, right = (loss_with(first, second, 0.9, teacher) for second in (first, ExactMap(teacher)))
    yield at_most("tcm", "second stage: its loss at what it inherits, over that at the exact map", inherited / right, 0.2)
    method = TCM(gap=None, discretization=(64, 64))
    drawn = method._draw(Roles(teacher, teacher), Batch(torch.randn(400, 2), Condition(), progress=0.9))
    yield at_most("tcm", "second stage: times at or below t'", float((drawn <= 0.4).sum()), 0)
    drawn = method._draw(Roles(teacher, teacher), Batch(torch.randn(400, 2), Condition(), progress=0.1))
    yield at_most("tcm", "ablation: first stage", float((drawn <= 0.4).sum()), 0, must_fail=True)


def second_stage(weight: float, boundary: float, steps: int = 500) -> float:
    """Deviation of one-step samples over the data's after a second stage from an untrained student and the exact first one."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), *DATA)
    student = MLPDenoiser(CosineVP(), 2, width=64, data_std=0.8, skip=False)
    truncation = Truncation(start=0.0, weight=weight, boundary=boundary)
    method = TCM(metric="l2", gap=None, discretization=(16, 16), train_times=(0.0, 1.0), weighting="uniform", truncation=truncation, solver="heun")

    def draw(step: int) -> Batch:
        return Batch(torch.randn(256, 2), Condition(), teacher.sample(256))

    kept = train(method, Roles(teacher, student, target=ExactMap(teacher)), draw, steps, {"student": 4e-3}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), kept, strict=True):
            p.copy_(value)
        x = student(torch.randn(4000, 2), torch.tensor(1.0, dtype=torch.float64))
    return float((x.std(0) / teacher.stds[0]).mean())


def boundary_checks() -> Iterator[Check]:
    yield between("tcm", "second stage from an untrained student: deviation of its samples over the data's", second_stage(1.0, 0.25), 0.9, 1.1)
    yield between("tcm", "ablation: without the weight of the boundary", second_stage(0.0, 0.25), 0.9, 1.1, must_fail=True)
