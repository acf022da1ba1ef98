"""Multi-student distillation: what a partition is, and what several students that are each too small come to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.analytic import GaussianMixture, MLPDenoiser, ring
from distill.denoiser import Condition, Denoiser, Prediction
from distill.experts import ByCondition, Routed
from distill.matching.rollout import Sample
from distill.matching.terms import Context, Regression
from distill.methods.base import Batch, Pairs
from distill.methods.distribution import DistributionMatching
from distill.methods.msd import MSD
from distill.roles import Roles
from distill.schedule import CosineVP, Kind, NoiseSchedule
from distill.verify.core import Check, at_most, descend, student_loss, train

CLASSES = 8


def told(labels: Tensor) -> Condition:
    return Condition({"class_labels": labels})


# -- partitions ---------------------------------------------------------------------------------------------------------


def partition_checks() -> Iterator[Check]:
    """Each condition belongs to one part; the parts are of equal size, and always the same."""
    worst = 0
    for classes, count in ((10, 2), (10, 3), (1000, 4), (7, 7)):
        parts = ByCondition.of_classes("class_labels", classes, count).choose(torch.zeros(classes), told(torch.arange(classes)))
        sizes = torch.bincount(parts, minlength=count)
        worst = max(worst, int(sizes.max() - sizes.min()), int((parts.diff() < 0).sum()))
    yield at_most("msd", "classes: parts that are not consecutive; largest difference of their sizes", worst, 1)
    torch.manual_seed(0)
    corners = torch.randn(5, 16) * 3
    vectors = (corners[torch.arange(500) % 5] + 0.3 * torch.randn(500, 16))[torch.randperm(500)]
    made = ByCondition.of_vectors("v", vectors, list(range(500)), 5)
    parts = made.parts(vectors)
    yield at_most("msd", "prompts in five groups: largest difference of the parts' sizes", float(torch.bincount(parts, minlength=5).sub(100).abs().max()), 0)
    kept = ByCondition.from_facts(made.facts())
    yield at_most("msd", "prompts: how many change parts when the partition is stored", float((kept.parts(vectors) != parts).sum()), 0)
    yield at_most("msd", "prompts in five groups: variance that is left inside the parts", inside(vectors, parts), 0.1)
    yield at_most("msd", "ablation: parts by chance", inside(vectors, parts[torch.randperm(500)]), 0.1, must_fail=True)


def inside(v: Tensor, parts: Tensor) -> float:
    """The share of the variance of (n, d) points that lies inside their parts."""
    means = torch.stack([v[parts == k].mean(0) for k in range(int(parts.max()) + 1)])
    return float((v - means[parts]).square().sum() / (v - v.mean(0)).square().sum())


# -- students that are too small ----------------------------------------------------------------------------------------


class Line(Denoiser):
    """x = p + q c + s z for class c: a student whose classes lie on a line, wherever the teacher's lie."""

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.weights = nn.ParameterDict({"place": torch.zeros(2).double(), "slope": torch.zeros(2).double(), "spread": torch.ones(2).double()})

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.weights.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.parameters())

    def means(self, labels: Tensor) -> Tensor:
        return self.weights["place"] + self.weights["slope"] * (labels / CLASSES - 0.5)[:, None]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        assert condition is not None
        x = self.means(condition.values["class_labels"]) + self.weights["spread"] * x_t  # type: ignore[arg-type]
        return Prediction(x, "x0", x_t, t.expand(len(x_t)), self.schedule)


class ExactCritic(Denoiser):
    """The critic that has converged: the denoiser of each class's samples."""

    kind: Kind = "x0"

    def __init__(self, student: Denoiser) -> None:
        self.student, self.schedule = student, student.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        with torch.no_grad():
            means, beyond = (self.student(torch.full((CLASSES, 2), z).double(), torch.tensor(1.0), told(torch.arange(CLASSES))) for z in (0.0, 1.0))
        return GaussianMixture(self.schedule, means, beyond - means).predict(x_t, t, condition)


def students_miss(count: int) -> tuple[float, float]:
    """(mean distance of the classes' means from the teacher's, with so many students, after training; the least that lines can do)."""
    torch.manual_seed(0)
    schedule, method, labels = CosineVP(), MSD(students=count, weighting="exact", score_times=(0.5, 0.5)), torch.arange(CLASSES)
    teacher, route = ring(schedule, CLASSES), ByCondition.of_classes("class_labels", CLASSES, count)
    student = Routed([Line(schedule) for _ in range(count)], route)
    roles = Roles(teacher, student, ExactCritic(student))
    batch = Batch(torch.randn(16, 2).double().repeat_interleave(CLASSES, 0), told(labels.repeat(16)))
    descend(student.parameters(), lambda: student_loss(method, roles, batch), 500, 0.3)
    with torch.no_grad():
        made = student(torch.zeros(CLASSES, 2).double(), torch.tensor(1.0), told(labels))
    parts, best = route.choose(labels, told(labels)), torch.zeros(CLASSES, 2).double()
    for k in range(count):
        own = torch.stack([torch.ones(int((parts == k).sum())), labels[parts == k]], 1).double()
        best[parts == k] = own @ torch.linalg.lstsq(own, teacher.means[parts == k]).solution
    distances = [(x - teacher.means).norm(dim=1).mean() for x in (made, best)]
    return float(distances[0]), float(distances[1])


def size_checks() -> Iterator[Check]:
    """With equal widths the divergence is least at the least squares of the means, student by student: a closed form."""
    found = {count: students_miss(count) for count in (1, 2, 4)}
    for count, (miss, least) in found.items():
        said = f"eight classes on a ring, {count} straight students: they miss by {miss:.3f}, least squares by {least:.3f}"
        yield at_most("msd", said, abs(miss - least), 0.01)
    yield at_most("msd", "two of them miss by, over what one does", found[2][0] / found[1][0], 0.6)
    yield at_most("msd", "ablation: one of them, over what one does", found[1][0] / found[1][0], 0.6, must_fail=True)


# -- one student, stage 0, pairs ----------------------------------------------------------------------------------------


def networks(seed: int = 0, width: int = 32, **others: Any) -> Roles:
    """An MLP of each role beside a ring of eight modes."""
    torch.manual_seed(seed)
    schedule = CosineVP()
    student, critic = (MLPDenoiser(schedule, 2, width, data_std=1.4) for _ in range(2))
    return Roles(ring(schedule, CLASSES), student, critic, **others)


def one_student_difference() -> float:
    """The largest difference of the losses of a step between one student and the engine as it is."""
    losses = []
    for method in (MSD(students=1, critic_steps=2), DistributionMatching(critic_steps=2)):
        roles = networks()
        torch.manual_seed(1)
        losses.append([float(loss.detach()) for _, loss, _ in method.step(roles, Batch(torch.randn(64, 2), told(torch.arange(64) % CLASSES)))])
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


@torch.no_grad()
def ignorance(roles: Roles) -> float:
    """The mean squared difference of student and teacher at noised samples."""
    draw = torch.Generator().manual_seed(2)
    assert isinstance(roles.teacher, GaussianMixture)
    x0, t = roles.teacher.sample(4000, draw), torch.rand(4000, generator=draw).double()
    x_t = roles.schedule.add_noise(x0, torch.randn(4000, 2, generator=draw), t)
    return float((roles.student(x_t, t) - roles.teacher(x_t, t)).square().mean())


def after_stage(method: MSD, steps: int = 600, batch: int = 256) -> float:
    """What is left of the student's ignorance after the first half of a training."""
    roles = networks()
    before, teacher = ignorance(roles), ring(CosineVP(), CLASSES)
    train(method, roles, lambda step: Batch(torch.randn(batch, 2), Condition(), teacher.sample(batch)), 2 * steps, {"student": 1e-2, "critic": 3e-3}, until=0.5)
    return ignorance(roles) / before


def strangers_gradient(shared: bool) -> float:
    """Of a regression on pairs of the first part of the classes: the gradient in the student of the second part."""
    schedule = CosineVP()
    student = Routed([Line(schedule), Line(schedule)], ByCondition.of_classes("class_labels", CLASSES, 2))
    noise, own = torch.randn(16, 2).double(), told(torch.zeros(16, dtype=torch.int64))
    roles = Roles(ring(schedule, CLASSES), student)
    pairs = Pairs(noise, torch.ones_like(noise), own)
    if shared:
        loss = Regression(kind="regression").loss(Context(roles, Batch(noise, own, pairs=pairs), Sample(noise, noise)))
    else:
        loss = (student(noise, torch.tensor(1.0), own) - pairs.x0).square().mean()
    gradients = torch.autograd.grad(loss, student.experts[1].parameters(), allow_unused=True)
    return sum(0.0 if g is None else float(g.norm()) for g in gradients)


def checks() -> Iterator[Check]:
    """All checks of the method."""
    yield from partition_checks()
    yield at_most("msd", "one student: largest difference of a step's losses from the engine's", one_student_difference(), 0.0)
    yield from size_checks()
    yield at_most("msd", "stage 0: what is left of a small student's difference from the teacher", after_stage(MSD(students=1, teacher_matching=0.5)), 0.1)
    yield at_most("msd", "ablation: as many steps of distillation in its place", after_stage(MSD(students=1, critic_steps=1)), 0.1, must_fail=True)
    yield at_most("msd", "students that pairs of another's conditions do not train", float(strangers_gradient(True) == 0), 0)
    yield at_most("msd", "ablation: pairs sent to their own student alone", float(strangers_gradient(False) == 0), 0, must_fail=True)
