"""Adversarial self-distillation: n steps learn from n + 1, and not the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from distill.analytic import AffineGenerator, gaussian
from distill.denoiser import Condition, Prediction
from distill.losses.adversarial import Discriminator
from distill.matching.adversary import GAN
from distill.matching.rollout import roll_out
from distill.methods.asd import ASD
from distill.methods.base import Batch
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import Check, at_most, between, replaced, train

MEAN, STD = (0.5, -0.4), (0.6, 0.9)


class ExactSecondStep(AffineGenerator):
    """A student of two steps whose second one is right already: exact samples, whatever the first one said."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        if bool((t > 0.75).all()):
            return super().predict(x_t, t, condition, features)
        fresh = torch.tensor(MEAN) + torch.tensor(STD) * torch.randn_like(x_t)
        return Prediction(fresh + 0 * self.mean, "x0", x_t, t.expand(len(x_t)), self.schedule)


def checks() -> Iterator[Check]:
    yield from direction_checks()
    yield from matching_checks()


def setting() -> ASD:
    """The adversary alone: the score difference has no weight (and is what trains the longest sample otherwise)."""
    return ASD(steps=2, score_weight=0.0, critic_steps=1, gan=GAN(weight=1.0, features="teacher", layers=["state"], real="longer", times=(0.0, 0.7)))


def parts() -> tuple[Roles, ExactSecondStep]:
    torch.manual_seed(0)
    schedule = CosineVP()
    teacher, student = gaussian(schedule, MEAN, STD), ExactSecondStep(schedule, (0.0, 0.0), (1.0, 0.5))
    critic = AffineGenerator(schedule, (0.0, 0.0), (1.0, 1.0))
    return Roles(teacher, student, critic, discriminator=Discriminator({"state": (3,)}, 64)), student


def direction_checks() -> Iterator[Check]:
    """The longer sample is an example, without gradient; it is compared with the shorter one's law, from noise of its own."""
    roles, student = parts()
    method, batch = setting(), Batch(torch.randn(64, 2), Condition())
    short = roll_out(student, "any_steps", method.sampler().times, batch.noise, batch.condition, steps=1)
    real = method._real(roles, batch, short)
    assert real is not None
    yield at_most("asd", "the longer sample has a gradient (1: yes)", float(real.requires_grad), 0)
    yield at_most("asd", "ablation: the shorter one has", float(short.x0.requires_grad), 0, must_fail=True)
    noise = float(torch.corrcoef(torch.stack([real[:, 0].detach(), batch.noise[:, 0]]))[0, 1].abs())
    yield at_most("asd", "correlation of the longer sample with the shorter one's noise", noise, 0.35)


def one_step_error(reversed_roles: bool, steps: int = 700) -> float:
    """Largest error of the one-step law's moments, in standard deviations, when the two-step law is exact."""
    roles, student = parts()
    method = setting()
    wrong = lambda self, roles, batch, sample: roll_out(roles.student, "any_steps", self._ladder, torch.randn_like(batch.noise), batch.condition, steps=1).x0.detach()  # noqa: E501,E731
    with replaced(ASD, "_real", wrong) if reversed_roles else nullcontext():
        kept = train(
            method, roles, lambda step: Batch(torch.randn(256, 2), Condition()), steps, {"student": 0.01, "critic": 1e-3, "discriminator": 3e-3},
            betas=(0.0, 0.99), average=0.98,
        )
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return float(torch.cat([(kept[0] - mean) / std, kept[1].abs() / std - 1]).abs().max())


def matching_checks() -> Iterator[Check]:
    """One step comes to have the law of two; against itself it learns nothing."""
    yield between("asd", "one step after learning from an exact two: error of its moments, in standard deviations", one_step_error(False), 0, 0.1)
    yield between("asd", "ablation: learning from its own one step", one_step_error(True, 150), 0, 0.1, must_fail=True)
