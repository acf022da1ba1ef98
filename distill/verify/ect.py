"""ECT: it begins as denoising, its gap closes, and with it the posterior mean becomes the map."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from distill.analytic import MLPDenoiser, gaussian
from distill.denoiser import Condition
from distill.mapping.pairs import Gap, noise_ratio, time_of
from distill.matching.times import Times
from distill.methods.base import Batch
from distill.methods.ect import ECT
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow
from distill.verify.consistency import DATA, spread
from distill.verify.core import Check, at_most, between, student_loss, train


def checks() -> Iterator[Check]:
    yield from gap_checks()
    yield from denoising_checks()
    yield from stage_checks()


def gap_checks() -> Iterator[Check]:
    """By hand: q = 2, stage 0, r = 1: n = 1 + 8/(1 + e) = 3.1515, 1 − n/2 < 0; stage 3: 1 − n/16 = 0.803029."""
    one, gap = torch.ones(1, dtype=torch.float64), Gap()
    yield at_most("ect", "r(s) at stage 0, r(t) = 1", float(gap.below(one, 0.0)), 0.0)
    yield at_most("ect", "r(s) at stage 3, r(t) = 1, against 0.803029", abs(float(gap.below(one, 0.4)) - 0.803029), 1e-6)
    for schedule in (CosineVP(), EDM(), Flow()):
        t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
        error = float((time_of(schedule, noise_ratio(schedule, t)) - t).abs().max())
        yield at_most("ect", f"t from its noise-to-signal ratio, {type(schedule).__name__}: error", error, 1e-9)


def denoising_checks() -> Iterator[Check]:
    """At stage 0 and r(t) < 1.9 the loss is the norm of the denoising error over r(t), weights of mean one."""
    torch.manual_seed(0)
    schedule = EDM()
    teacher = gaussian(schedule, *DATA)
    high = float(time_of(schedule, torch.tensor([1.9], dtype=torch.float64)))
    method = ECT(train_times=Times(low=0.3, high=high))
    network, batch = MLPDenoiser(schedule, 2, 32), Batch(torch.randn(512, 2), Condition(), teacher.sample(512))
    assert batch.x0 is not None

    def apart(progress: float) -> float:
        torch.manual_seed(1)
        loss = float(student_loss(method, Roles(teacher, network), Batch(batch.noise, Condition(), batch.x0, progress)).detach())
        torch.manual_seed(1)
        t = method._draw(Roles(teacher, network), batch)
        sigma = schedule.sigma(t)
        x0 = batch.x0
        assert x0 is not None
        error = (network(schedule.add_noise(x0, batch.noise, t), t) - x0).norm(dim=1) / 2**0.5
        plain = ((1 / sigma) / (1 / sigma).mean() * error).mean()
        return abs(loss / float(plain.detach()) - 1)

    yield at_most("ect", "stage 0: the loss over that of denoising: error", apart(0.0), 5e-3)
    yield at_most("ect", "ablation: the same at stage 4", apart(0.55), 5e-3, must_fail=True)


def tuned(stages: int, steps: int = 900) -> float:
    """Standard deviation of one-step samples over the data's."""
    torch.manual_seed(0)
    teacher = gaussian(Flow(), *DATA)
    student = MLPDenoiser(Flow(), 2, width=64, data_std=0.8)
    method = ECT(gap=Gap(stages=stages), metric="l2", train_times=Times(law="log_sigma", mean=0.5, std=2.5))

    def draw(step: int) -> Batch:
        return Batch(torch.randn(512, 2), Condition(), teacher.sample(512))

    kept = train(method, Roles(teacher, student), draw, steps, {"student": 4e-3}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), kept, strict=True):
            assert isinstance(p, nn.Parameter)
            p.copy_(value)
    return spread(teacher, student)


def stage_checks() -> Iterator[Check]:
    yield between("ect", "after eight stages: deviation of one-step samples over the data's", tuned(8), 0.93, 1.05)
    yield between("ect", "ablation: the first stage for ever, which is denoising", tuned(1, 300), 0.93, 1.05, must_fail=True)
