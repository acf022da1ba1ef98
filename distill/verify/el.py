"""The embedding loss: what its estimate is on equal and on unequal laws, and what it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.analytic import AffineGenerator, gaussian
from distill.denoiser import Condition
from distill.losses.embedding import random_embedding, squared_discrepancy
from distill.matching.terms import Embedding
from distill.methods.base import Batch
from distill.methods.el import EL
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import Check, at_most, between, replaced, train


def checks() -> Iterator[Check]:
    yield from estimate_checks()
    yield from condition_checks()
    yield from training_checks()


def linear(x: Tensor) -> Tensor:
    """The ablation of the networks: none of their nonlinearities."""
    return x


def significance(shift: float, std: float, biased: bool = False, repeats: int = 600, n: int = 16) -> float:
    """Mean of the estimate between N(0, 1)² and N(shift, std²)², in its standard errors, each time with another network."""
    torch.manual_seed(0)
    values = []
    for seed in range(repeats):
        a, b = torch.randn(n, 2), shift + std * torch.randn(n, 2)
        embed = random_embedding(a, 32, 2, seed)
        u, v = embed(a), embed(b)
        values.append((u.mean(0) - v.mean(0)).square().mean() if biased else squared_discrepancy(u, v))
    value = torch.stack(values)
    return float(value.mean() / value.std() * math.sqrt(repeats))


def estimate_checks() -> Iterator[Check]:
    """A U-statistic: zero in the mean on equal laws; positive where means or variances differ, the latter for networks that are not linear."""
    yield between("el", "equal laws: mean of the estimate, in standard errors", significance(0.0, 1.0), -3, 3)
    yield between("el", "ablation: samples compared with themselves, too", significance(0.0, 1.0, biased=True), -3, 3, must_fail=True)
    yield between("el", "means 0.2 apart: mean of the estimate, in standard errors", significance(0.2, 1.0), 4, math.inf)
    yield between("el", "another variance: mean of the estimate, in standard errors", significance(0.0, 1.5), 4, math.inf)
    with replaced(F, "relu", linear):
        yield between("el", "ablation: another variance, linear networks", significance(0.0, 1.5), 4, math.inf, must_fail=True)


def swapped(by_condition: bool) -> float:
    """The term's mean for a student that has two classes the wrong way round, over its mean for one that has none right."""
    torch.manual_seed(0)
    group = torch.arange(64) % 2
    real = (2.0 * group - 1)[:, None] + 0.3 * torch.randn(200, 64, 2)
    wrong = (1 - 2.0 * group)[:, None] + 0.3 * torch.randn(200, 64, 2)
    told = group if by_condition else None

    def mean(x: Tensor) -> float:
        pairs = zip(x, real, strict=True)
        return float(torch.stack([squared_discrepancy(e(a), e(b), told) for i, (a, b) in enumerate(pairs) for e in [random_embedding(a, 32, 2, i)]]).mean())

    return mean(wrong) / mean(wrong + 4.0)


def condition_checks() -> Iterator[Check]:
    """Classes that are exchanged leave the marginal as it is: only a comparison by condition sees them."""
    yield between("el", "exchanged classes: share of the loss of a far student", swapped(True), 0.05, 1)
    yield between("el", "ablation: compared without conditions", swapped(False), 0.05, 1, must_fail=True)


def trained(activation: Callable[[Tensor], Tensor] | None, steps: int = 400) -> float:
    """Largest error of an affine student's means and standard deviations, over the teacher's: the embedding loss alone."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), (0.5, -0.8), (0.6, 0.9))
    student = AffineGenerator(teacher.schedule, (0.0, 0.0), (1.3, 0.4))
    method = EL(objective="none", terms=[Embedding(width=32, depth=2)])
    with nullcontext() if activation is None else replaced(F, "relu", activation):
        train(
            method, Roles(teacher, student), lambda step: Batch(torch.randn(256, 2), Condition(), teacher.sample(256)), steps, {"student": 0.03}, (0.5, 0.99),
        )
    return float(torch.cat([(student.mean / teacher.means[0] - 1), (student.std / teacher.stds[0] - 1)]).detach().abs().max())


def training_checks() -> Iterator[Check]:
    """As the only loss it brings a Gaussian's moments; linear networks leave its width where it was."""
    yield at_most("el", "embedding loss alone: relative error of a Gaussian's moments", trained(None), 0.05)
    yield at_most("el", "ablation: the same with linear networks", trained(linear), 0.05, must_fail=True)
