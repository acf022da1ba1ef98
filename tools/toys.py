"""Two mixtures in the plane whose denoisers are known exactly, and the small networks that are trained on them: what the benchmarks
of many runs use. As in a distillation proper, student and critic start as a network that has learnt the teacher's denoiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_runs import count_passes
from torch import Tensor

from distill.analytic import GaussianMixture, MLPDenoiser, ring
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.matching.adversary import GAN
from distill.matching.critic import denoising_loss
from distill.methods.base import Batch, strata
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import descend, train
from distill.verify.dmd2 import mode_masses, ring_scores

BATCH, WIDTH, PRETRAINING = 256, 64, 1000
RATES = {"student": 2e-3, "critic": 4e-3, "discriminator": 4e-3}  #: of Adam, falling to zero
#: A discriminator's features here are (x_t, t) themselves: small networks have no layers by name.
ADVERSARY = GAN(layers=["state"])


def unbalanced(schedule: Any) -> GaussianMixture:
    """Six Gaussians off the middle, the widest 2.5 times the narrowest, the heaviest (0.32) 8 times the lightest (0.04)."""
    means = torch.tensor([[-2.2, 0.6], [-0.6, 2.0], [1.6, 1.8], [2.4, -0.6], [0.4, -0.4], [-1.2, -2.0]])
    stds = torch.tensor([0.3, 0.2, 0.4, 0.25, 0.5, 0.3])[:, None]
    return GaussianMixture(schedule, means, stds, torch.tensor([0.32, 0.04, 0.24, 0.08, 0.20, 0.12]))


MIXTURES: dict[str, Callable[[Any], GaussianMixture]] = {"ring": lambda schedule: ring(schedule, std=0.3), "unbalanced": unbalanced}


@dataclass(frozen=True)
class Toy:
    """A teacher, and the network that has learnt its denoiser."""

    teacher: GaussianMixture
    network: MLPDenoiser


def make_toy(mixture: str) -> Toy:
    """The same at every call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schedule = CosineVP()
    teacher = MIXTURES[mixture](schedule)
    network = MLPDenoiser(schedule, 2, WIDTH, data_std=1.4)

    def loss() -> Tensor:
        return denoising_loss(network, teacher.sample(2 * BATCH), strata(torch.empty(2 * BATCH)), None)

    descend(network.parameters(), loss, PRETRAINING, 3e-3)
    return Toy(teacher, network)


def train_toy(
    toy: Toy, method: DistributionMatching, seed: int, steps: int | None = None, factor: float = 1.0, passes: int | None = None, average: float = 0.99,
) -> tuple[Tensor, dict[str, Any]]:
    """(4,000 samples of the student, what it took).

    Args:
        steps: of the student; or else passes: so many forward passes of a batch, student, critic and teacher together.
        factor: of all learning rates; average: decay of the student's average, 0: its last weights.
    """
    assert (steps is None) != (passes is None)
    torch.manual_seed(1000 + seed)
    student, critic = copy.deepcopy(toy.network), copy.deepcopy(toy.network)
    discriminator = Discriminator({"state": (3,)}, hidden=WIDTH) if method.gan is not None else None
    roles = Roles(toy.teacher, student, critic, discriminator=discriminator, state=method.initial_state())
    rates = {role: RATES[role] * factor for role in roles.trained()}
    counted = count_passes(roles)
    student_steps = 0

    def draw(step: int) -> Batch:
        nonlocal student_steps
        student_steps += 1
        return Batch(torch.randn(BATCH, 2), Condition(), toy.teacher.sample(BATCH))

    def done() -> float:
        return student_steps / steps if steps is not None else sum(counted.values()) / (BATCH * (passes or 1))

    averaged = train(method, roles, draw, steps or passes or 0, rates, betas=(0.0, 0.99), average=average, done=done)
    spent = {"steps": student_steps, "passes": dict(counted)}
    with torch.no_grad():
        for p, value in zip(student.parameters(), averaged, strict=True):
            p.copy_(value)
    del toy.teacher.predict  # the counter's
    return samples(student), spent


@torch.no_grad()
def samples(student: MLPDenoiser) -> Tensor:
    """(4,000, 2) in one step."""
    return student(torch.randn(4000, 2), torch.tensor(1.0, dtype=torch.float64))


def scores(teacher: GaussianMixture, x: Tensor) -> dict[str, Any]:
    """Distance: sliced 1-Wasserstein, over that of two sets of the teacher's. Coverage: the mass that the modes have in common with the
    teacher's, sum of min(share, weight). Spread: total variance over the teacher's, its root."""
    if not bool(x.isfinite().all()):
        return {"finite": False, "distance": None, "coverage": 0.0, "spread": 0.0}
    torch.manual_seed(0)  # the same sets of the teacher's for everybody
    distance = ring_scores(teacher, x)[1]
    coverage = float(torch.minimum(mode_masses(teacher, x).double(), teacher.log_weights.exp()).sum())
    spread = math.sqrt(float(x.var(0).sum()) / float(teacher.sample(20_000).var(0).sum()))
    return {"finite": True, "distance": distance, "coverage": coverage, "spread": spread}
