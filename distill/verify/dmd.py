"""DMD against closed forms: its normaliser, what regression alone learns, and the modes that pairs keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.analytic import AffineGenerator, ExactCritic, GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition
from distill.matching.terms import Regression
from distill.methods.base import Batch, Pairs
from distill.methods.dmd import DMD
from distill.roles import Roles
from distill.schedule import EDM, CosineVP
from distill.verify.core import Check, at_most, starting_at, train
from distill.verify.dmd2 import two_modes


def checks() -> Iterator[Check]:
    yield from normalizer_checks()
    yield from regression_checks()
    yield from mixture_checks()


# -- the normaliser -----------------------------------------------------------------------------------------------------


def pull(scale: float, weighting: str) -> float:
    """The gradient of a student's mean when the data, the student and the noise level are all ``scale`` times as large."""
    torch.manual_seed(0)
    schedule = EDM(sigma_min=1e-3, sigma_max=10.0 * scale)
    t = float(((0.7 * scale) ** (1 / schedule.rho) - schedule.low) / (schedule.high - schedule.low))
    teacher, generator = gaussian(schedule, (scale,), (0.6 * scale,)), AffineGenerator(schedule, (0.3 * scale,), (1.1 * scale,))
    method = DMD(weighting=weighting, score_times=(t, t), terms=[])  # type: ignore[arg-type]
    batch = Batch(torch.randn(4096, 1, dtype=torch.float64), Condition())
    _, loss, _ = next(iter(method.step(Roles(teacher, generator, ExactCritic(generator)), batch)))
    (gradient,) = torch.autograd.grad(loss, generator.mean)
    return float(gradient)


def normalizer_checks() -> Iterator[Check]:
    """g is dimensionless: data in other units receive the same one."""
    yield at_most("dmd", "relative change of g when everything is 10 times as large", abs(pull(10.0, "dmd") / pull(1.0, "dmd") - 1), 1e-5)
    yield at_most("dmd", "ablation: the same without the normaliser", abs(pull(10.0, "none") / pull(1.0, "none") - 1), 1e-5, must_fail=True)


# -- regression ---------------------------------------------------------------------------------------------------------


def regressed(paired: bool) -> float:
    """Largest error of an affine student's map after regression alone, against the Gaussian's exact flow map x = m + s z."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), (0.5, -0.3), (0.6, 0.9))
    student = AffineGenerator(teacher.schedule, (0.0, 0.0), (1.0, 1.0))
    one = torch.ones(512, dtype=torch.float64)

    def draw(step: int) -> Batch:
        z = torch.randn(512, 2, dtype=torch.float64)
        x0 = teacher.flow_map(z, one, 0 * one)
        return Batch(z, Condition(), pairs=Pairs(z if paired else torch.randn_like(z), x0, Condition()))

    method = DMD(objective="none", terms=[Regression(weight=1.0, metric="l2")])
    train(method, Roles(teacher, student), draw, 300, {"student": 0.05})
    error = torch.cat([student.mean - teacher.means[0], student.std - teacher.stds[0]])
    return float(error.detach().abs().max())


def regression_checks() -> Iterator[Check]:
    """On a Gaussian the ODE is affine, and regression finds it; on pairs that are none it finds the mean alone."""
    yield at_most("dmd", "regression alone: error of the ODE's map on a Gaussian", regressed(True), 1e-3)
    yield at_most("dmd", "ablation: noise and samples that do not belong together", regressed(False), 1e-3, must_fail=True)


# -- modes --------------------------------------------------------------------------------------------------------------


def ordered_pairs(teacher: GaussianMixture, z: Tensor, grid: int = 20001) -> Tensor:
    """The flow map of a mixture in one dimension: it keeps order, so it takes the normal's quantiles to the mixture's. (n, 1) → (n, 1)."""
    x = torch.linspace(-6, 6, grid, dtype=torch.float64)
    cdf = (teacher.log_weights.exp() * torch.special.ndtr((x[:, None] - teacher.means[:, 0]) / teacher.stds[:, 0])).sum(1)
    place = torch.searchsorted(cdf, torch.special.ndtr(z.double())).clamp(max=grid - 1)
    return x[place].to(z)


def left_mass(pairs: bool, seed: int, steps: int = 400) -> float:
    """Share of samples at the left mode of 0.4 N(−2, 0.25) + 0.6 N(2, 0.25), for a student that starts at the right one."""
    torch.manual_seed(seed)
    teacher = two_modes(CosineVP())
    student, critic = (MLPDenoiser(teacher.schedule, 1, 32, data_std=2.0) for _ in range(2))
    starting_at(student, torch.ones(1), 0.1)

    def draw(step: int) -> Batch:
        z = torch.randn(256, 1)
        return Batch(torch.randn(256, 1), Condition(), pairs=Pairs(z, ordered_pairs(teacher, z), Condition()))

    # Five critic updates: with one, the student's swings throw samples across at random, and now and then the right number of them.
    method = DMD(score_times=(0.02, 0.25), critic_steps=5, terms=[Regression(weight=1.0)] if pairs else [])
    train(method, Roles(teacher, student, critic), draw, steps, {"student": 3e-3, "critic": 6e-3}, betas=(0.5, 0.99))
    with torch.no_grad():
        x = student(torch.randn(8000, 1), torch.tensor(1.0, dtype=torch.float64))
    return float((x < 0).double().mean())


def mixture_checks() -> Iterator[Check]:
    """At low noise reverse KL hardly knows a mode's mass; pairs say it."""
    what = {True: "error of the mass of a mode that the student starts without (worst of two seeds)", False: "ablation: the same without pairs"}
    for pairs in what:
        worst = max(abs(left_mass(pairs, seed) - 0.4) for seed in (0, 1))
        yield at_most("dmd", what[pairs], worst, 0.08, must_fail=not pairs)
