"""PG-SB against VSD: equal bounds are one scale, and a random shared scale moves no fixed point."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.methods.pg_sb import PGSB
from distill.methods.vsd import VSD
from distill.roles import Roles
from distill.verify.classes import SCHEDULE, SIGMA, MirroredCritic, MirroredGenerator, batch_of_classes, end_point, largest_error, level, two_classes
from distill.verify.core import Check, at_most, relative_error, replaced


def student_gradient(method: VSD | PGSB, count: int = 1) -> Tensor:
    """What the first yield of ``step`` is in a student's (mean, width), (count, 2)."""
    generator = MirroredGenerator(SCHEDULE, (0.4,), (0.7,))
    batch, noise = batch_of_classes(512)
    roles = Roles(two_classes(), generator, MirroredCritic(generator))
    found = []
    with replaced(torch, "randn_like", lambda x: noise):
        for _ in range(count):
            _, loss, _ = next(iter(method.step(roles, batch)))
            found.append(torch.cat(torch.autograd.grad(loss, generator.parameters())))
    return torch.stack(found)


def checks() -> Iterator[Check]:
    torch.manual_seed(0)
    t = (level(0.5), level(0.5))
    fixed = student_gradient(VSD(guidance_scale=3.0, score_times=t))
    equal = student_gradient(PGSB(guidance_scale=(3.0, 3.0), score_times=t))
    yield at_most("pg_sb", "bounds [3, 3] against VSD at 3", relative_error(equal, fixed), 1e-6)
    drawn = student_gradient(PGSB(guidance_scale=(0.5, 4.0), score_times=t), count=64)
    middle = student_gradient(VSD(guidance_scale=2.25, score_times=t))
    yield at_most("pg_sb", "mean gradient over drawn scales against that at their mean", relative_error(drawn.mean(0), middle[0]), 0.02)
    yield at_most("pg_sb", "ablation: [0.5, 4] as a fixed scale: spread of the gradient", float(drawn.std(0).norm() / middle.norm()), 1e-6, must_fail=True)
    low = (level(SIGMA), level(SIGMA))
    random = end_point(PGSB(score_times=low))
    yield at_most("pg_sb", f"two classes end at +1, 1: {random[0]:.3f}, {random[1]:.3f}", largest_error(random, (1.0, 1.0)), 0.01)
    alone = end_point(PGSB(score_times=low, critic_guidance_scale=1.0, critic_null=0.0))
    name = f"ablation: the scale drawn for the teacher alone: {alone[0]:.3f}, {alone[1]:.3f}"
    yield at_most("pg_sb", name, largest_error(alone, (1.0, 1.0)), 0.01, must_fail=True)
