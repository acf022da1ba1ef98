"""LADD: an adversary through the frozen teacher's features, what its noise level shows it, and real samples that the teacher made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from distill.analytic import AffineGenerator, GaussianMixture, gaussian
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.matching.adversary import GAN, discriminator_loss
from distill.matching.times import TimeLaw
from distill.methods.base import Batch, Pairs
from distill.methods.ladd import LADD
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import Check, at_most, between, replaced, train


def checks() -> Iterator[Check]:
    yield from gradient_checks()
    yield from moment_checks()
    yield from level_checks()
    yield from teacher_checks()


def setting(times: TimeLaw) -> LADD:
    return LADD(gan=GAN(weight=1.0, features="teacher", layers=["state"], loss="hinge", times=times))


def parts(teacher: GaussianMixture, mean: Sequence[float], std: Sequence[float]) -> tuple[Roles, AffineGenerator]:
    student = AffineGenerator(teacher.schedule, mean, std)
    return Roles(teacher, student, discriminator=Discriminator({"state": (3,)}, 64)), student


# -- where gradients go -------------------------------------------------------------------------------------------------


def reach(blind: bool) -> float:
    """Norm of the gradient that the student's sample receives through the teacher's features."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), (0.5, -0.3), (0.6, 0.9))
    roles, student = parts(teacher, (0.0, 0.0), (1.0, 1.0))
    told = type(teacher).features

    def cut(self: Any, *arguments: Any) -> Any:
        with torch.no_grad():
            return told(self, *arguments)

    with replaced(type(teacher), "features", cut if blind else told):
        _, loss, _ = next(iter(setting((0.2, 0.8)).step(roles, Batch(torch.randn(64, 2), Condition(), teacher.sample(64)))))
        (gradient,) = torch.autograd.grad(loss, student.mean, allow_unused=True) if loss.requires_grad else (None,)
    return 0.0 if gradient is None else float(gradient.norm())


def gradient_checks() -> Iterator[Check]:
    yield between("ladd", "gradient of the student's mean through the frozen teacher", reach(False), 1e-4, math.inf)
    yield between("ladd", "ablation: the teacher evaluated without gradient", reach(True), 1e-4, math.inf, must_fail=True)


# -- training -----------------------------------------------------------------------------------------------------------


def error(rate: float, steps: int) -> float:
    """Largest error of an affine student's moments, in the teacher's standard deviations: the adversary alone."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), (0.5, -0.4), (0.6, 0.9))
    roles, _ = parts(teacher, (0.0, 0.0), (0.8, 0.8))
    kept = train(
        setting((0.0, 0.7)), roles, lambda step: Batch(torch.randn(256, 2), Condition(), teacher.sample(256)), steps,
        {"student": 0.02, "discriminator": rate}, betas=(0.0, 0.99), average=0.98,
    )
    std = teacher.stds[0]
    return float(torch.cat([kept[1].abs() / std - 1, (kept[0] - teacher.means[0]) / std]).abs().max())


def moment_checks() -> Iterator[Check]:
    yield at_most("ladd", "adversary alone: largest error of a Gaussian's moments, in standard deviations", error(3e-3, 600), 0.15)
    yield at_most("ladd", "ablation: a discriminator that does not learn", error(0.0, 100), 0.15, must_fail=True)


def told_apart(times: TimeLaw, steps: int = 200) -> float:
    """Accuracy of a discriminator between spreads of 0.1 and of 0.3 along one axis, beside an equal one of 0.9."""
    torch.manual_seed(0)
    teacher, gan = gaussian(CosineVP(), (0.0, 0.0), (0.1, 0.9)), setting(times).gan
    roles, student = parts(teacher, (0.0, 0.0), (0.3, 0.9))
    assert gan is not None
    optimizer, found = torch.optim.Adam(roles.parameters("discriminator"), 3e-3), []
    for _ in range(steps):
        x = student.law().sample(256).detach()
        loss, accuracy = discriminator_loss(gan, roles, x, Condition(), teacher.sample(256), 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(accuracy))
    return sum(found[-50:]) / 50


def level_checks() -> Iterator[Check]:
    """The noise level says what is judged: high levels hide what is fine."""
    yield between("ladd", "accuracy on a fine axis, low noise levels", told_apart((0.0, 0.3)), 0.55, 1)
    yield between("ladd", "ablation: the same at high noise levels", told_apart((0.9, 0.98)), 0.55, 1, must_fail=True)


# -- the teacher's samples as real ones ---------------------------------------------------------------------------------


def followed(real: str) -> float:
    """Distance of the student's mean from the teacher's, when the data lie elsewhere."""
    torch.manual_seed(0)
    teacher, data = gaussian(CosineVP(), (0.5, -0.4), (0.6, 0.9)), gaussian(CosineVP(), (-1.0, 1.0), (0.6, 0.9))
    roles, _ = parts(teacher, (0.0, 0.0), (0.6, 0.9))
    method = setting((0.0, 0.7)).model_copy(update={"real": real})

    def draw(step: int) -> Batch:
        z = torch.randn(256, 2)
        return Batch(torch.randn(256, 2), Condition(), data.sample(256), pairs=Pairs(z, (teacher.means + teacher.stds * z).float(), Condition()))

    kept = train(method, roles, draw, 300, {"student": 0.01, "discriminator": 3e-3}, betas=(0.0, 0.99), average=0.95)
    return float((kept[0] - teacher.means[0]).norm())


def teacher_checks() -> Iterator[Check]:
    """With ``real: teacher`` no data are looked at."""
    yield at_most("ladd", "real: teacher, data elsewhere: distance from the teacher's mean", followed("teacher"), 0.15)
    yield at_most("ladd", "ablation: real: data", followed("data"), 0.15, must_fail=True)
