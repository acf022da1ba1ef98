"""rCM: what sCM keeps and DMD drops, and what the regulariser adds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill.analytic import AffineGenerator, ExactCritic, GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition
from distill.mapping.tangent import Tangent
from distill.methods.base import Batch, Method
from distill.methods.distribution import DistributionMatching
from distill.methods.rcm import RCM
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.consistency import DATA
from distill.verify.core import Check, at_most, between, starting_at, train


def checks() -> Iterator[Check]:
    yield from rest_checks()
    yield from mode_checks()


def score_gradient(mean: float) -> float:
    """Norm of the regulariser's gradient for a generator with this first mean, a converged critic, and a consistency term that is taken out."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), *DATA)
    student = AffineGenerator(CosineVP(), (mean, DATA[0][1]), DATA[1])
    roles = Roles(teacher, student, critic=ExactCritic(student))
    own = RCM(steps=1, matching=DistributionMatching(weighting="none"), matching_from=0.0).score_matching(0.5)
    assert own is not None
    batch = Batch(torch.randn(512, 2, dtype=torch.float64), Condition())
    loss, _ = own._student_loss(roles, batch, own._sample(roles, batch))
    return float(torch.stack([g.norm() for g in torch.autograd.grad(loss, student.parameters())]).sum())


def rest_checks() -> Iterator[Check]:
    yield at_most("rcm", "gradient of the regulariser where the student's law is the teacher's", score_gradient(DATA[0][0]), 1e-6)
    yield at_most("rcm", "ablation: a mean that is 0.3 off", score_gradient(DATA[0][0] + 0.3), 1e-6, must_fail=True)


TEACHER = GaussianMixture(CosineVP(), torch.tensor([[0.4, 0.0], [-3.6, 0.0]]), torch.full((2, 1), 0.3), torch.tensor([0.9, 0.1]))


def small_mode(method: Method, steps: int, batch: int = 256) -> tuple[float, float]:
    """(share of one-step samples that are at the mode of a tenth, share of those between the two), from a student that begins at the large one."""
    torch.manual_seed(0)
    networks: dict[str, Any] = {role: MLPDenoiser(CosineVP(), 2, 64, 1.0) for role in ("student", "critic")}
    starting_at(networks["student"], torch.tensor([0.4, 0.0]), 0.3)
    roles = Roles(TEACHER, **networks)
    roles.state = method.initial_state()
    rates = {role: 2e-3 for role in method.roles}

    def draw(step: int) -> Batch:
        return Batch(torch.randn(batch, 2), Condition(), TEACHER.sample(batch))

    kept: list[Tensor] = train(method, roles, draw, steps, rates, betas=(0.5, 0.99), average=0.98)
    with torch.no_grad():
        for p, value in zip(networks["student"].parameters(), kept, strict=True):
            assert isinstance(p, nn.Parameter)
            p.copy_(value)
        x = networks["student"](torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)), torch.tensor(1.0, dtype=torch.float64))
    near = torch.cdist(x.double(), TEACHER.means) / 0.3 < 3
    return float(near[:, 1].double().mean()), float((~near.any(1)).double().mean())


def mode_checks() -> Iterator[Check]:
    """Two modes, between which no score difference at t ≤ 0.5 leads: DMD alone stays at the large one, where the student began. sCM has both,
    and much in between; the two together have both, and less in between."""
    plain: dict[str, Any] = {"steps": 1, "tangent": Tangent(c=None, adaptive=False), "train_times": (0.0, 1.0)}
    score = DistributionMatching(critic_steps=2, score_times=(0.02, 0.5))
    both, alone = small_mode(RCM(**plain, matching=score), 500), small_mode(RCM(**plain, matching=None), 500)
    yield at_most("rcm", "share of samples between two modes, over that of sCM alone", both[1] / max(alone[1], 1e-3), 0.95)
    yield between("rcm", "share of samples at the mode of a tenth", both[0], 0.02, 0.2)
    yield between("rcm", "ablation: the regulariser alone", small_mode(score, 400)[0], 0.02, 0.2, must_fail=True)
