"""RG-LCD: what the stand-in learns, whom its gradients reach, and what an expert with a weakness does with and without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distill.analytic import MLPDenoiser, gaussian
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.mapping.proxy import ProxyReward, preference_distance
from distill.matching.terms import Reward
from distill.methods.base import Batch
from distill.methods.rg_lcd import RGLCD
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import Check, at_most, between, train


def checks() -> Iterator[Check]:
    yield from preference_checks()
    yield from gradient_checks()
    yield from weakness_checks()


def first(images: Tensor, inputs: Any) -> Tensor:
    """An expert: the larger the first coordinate, the better."""
    return images[:, 0]


def fragile(images: Tensor, inputs: Any) -> Tensor:
    """The same with a weakness: a ripple of the second coordinate, too fine for a smooth stand-in to learn at once."""
    return images[:, 0] + torch.sin(10 * images[:, 1])


def preference_checks() -> Iterator[Check]:
    """The distance of preferences and its gradient are zero at the expert's scores plus any constant of the condition."""
    torch.manual_seed(0)
    expert, constant = torch.randn(2, 50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    for title, mine, must_fail in (("the expert plus a constant", expert + constant, False), ("ablation: twice the expert", 2 * expert, True)):
        mine = mine.requires_grad_()
        distance = preference_distance(expert[0] - expert[1], mine[0] - mine[1])
        (slope,) = torch.autograd.grad(distance, mine)
        yield at_most("rg_lcd", f"{title}: KL and its gradient", float(distance.detach() + slope.norm()), 1e-9, must_fail)


TEACHER = ((0.0, 0.0), (0.6, 0.6))


def parts(function: str) -> tuple[Roles, MLPDenoiser, RGLCD]:
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), *TEACHER)
    student = MLPDenoiser(CosineVP(), 2, 64, 0.6)
    roles = Roles(teacher, student, discriminator=Discriminator({"state": (3,)}), decode=lambda x: x)
    proxy = ProxyReward(function=f"{__name__}:{function}", layers=["state"], level=0.05, weight=0.1)
    return roles, student, RGLCD(proxy=proxy, target="stop_gradient", discretization=(8, 8), steps=1, metric="l2")


def draw(count: int = 256) -> Batch:
    return Batch(torch.randn(count, 2), Condition(), gaussian(CosineVP(), *TEACHER).sample(count), inputs=[None] * count)


def gradient_checks() -> Iterator[Check]:
    """Each update names one of the two and carries a gradient to it alone; the student's goes through the stand-in, and not the expert."""
    roles, student, method = parts("first")
    updates = method.step(roles, draw())
    _, loss, _ = next(updates)
    assert roles.discriminator is not None
    size = sum(float(g.norm()) for g in torch.autograd.grad(loss, list(student.parameters())))
    yield between("rg_lcd", "gradient of the student's loss in the student", size, 1e-6, 1e6)
    role, loss, _ = next(updates)
    assert role == "discriminator"
    reached = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, retain_graph=True)
    yield at_most("rg_lcd", "parameters of the student that the stand-in's loss reaches", float(sum(g is not None for g in reached)), 0)
    own = torch.autograd.grad(loss, list(roles.discriminator.parameters()), allow_unused=True)
    yield at_most("rg_lcd", "ablation: those of the stand-in", float(sum(g is not None for g in own)), 0, must_fail=True)


def ripple(direct: bool, steps: int = 300) -> tuple[float, float]:
    """(mean of the first coordinate, mean of the ripple) of the student's samples; both are zero for the teacher's."""
    roles, student, method = parts("fragile")
    if direct:
        method = method.model_copy(update={"proxy": None, "terms": [Reward(function=f"{__name__}:fragile", weight=0.1)]})
    rates = {"student": 0.004} | ({} if direct else {"discriminator": 3e-3})
    train(method, roles, lambda step: draw(), steps, rates, betas=(0.0, 0.99))
    with torch.no_grad():
        x = student(torch.randn(20_000, 2), torch.tensor(1.0, dtype=torch.float64))
    return float(x[:, 0].mean()), float(torch.sin(10 * x[:, 1]).mean())


def weakness_checks() -> Iterator[Check]:
    """The student comes to have more of what both want; and of the ripple only if it sees the expert's own gradient."""
    wanted, hacked = ripple(False)
    yield between("rg_lcd", "stand-in: mean of what the expert rewards", wanted, 0.2, 10.0)
    yield at_most("rg_lcd", "stand-in: mean of the ripple that is the expert's weakness", abs(hacked), 0.1)
    yield at_most("rg_lcd", "ablation: the expert's own gradient: the same", abs(ripple(True)[1]), 0.1, must_fail=True)
