"""Phased DMD in one dimension: four narrow modes, two networks, and what the law is where the first one ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distill.analytic import GaussianMixture, MLPDenoiser
from distill.denoiser import Condition, Denoiser
from distill.experts import ByTime, Routed
from distill.matching import critic as critics
from distill.methods import distribution
from distill.methods.base import Batch
from distill.methods.phased_dmd import PhasedDMD
from distill.roles import Roles
from distill.schedule import Flow
from distill.verify.core import Check, at_most, descend, replaced, train

END = 0.5  #: t_1, where the first phase ends
SETTINGS: dict[str, Any] = {"steps": 2, "phases": 2, "critic_steps": 2}


def four_modes() -> GaussianMixture:
    """Modes of width 0.05 at −1, 0, 1, 2."""
    return GaussianMixture(Flow(), torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), torch.tensor([[0.05]]))


# -- the critic's target ------------------------------------------------------------------------------------------------


class Shifted(Denoiser):
    """A denoiser plus a number in each of five ranges of x_t: the loss has no slope in these at the loss's own optimum."""

    kind = "x0"

    def __init__(self, right: GaussianMixture, inner: Tensor) -> None:
        self.right, self.schedule, self.inner = right, right.schedule, inner
        self.shifts = torch.zeros(len(inner) + 1, dtype=torch.float64, requires_grad=True)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Any = ()) -> Any:
        said = self.right.predict(x_t, t)
        said.value = said.value + self.shifts[torch.bucketize(x_t[:, 0], self.inner)][:, None]
        return said


def target_bias(loss: Callable[..., Tensor], t: float, count: int = 400_000) -> float:
    """By how much the optimum of a critic's loss misses the denoiser of x_s's law (the teacher's own, noised to s = 0.5) at t: in the
    worst of five ranges of x_t, in units of x0."""
    torch.manual_seed(0)
    teacher = four_modes()
    clean = teacher.sample(count).double()
    s, times = (torch.full((count,), level, dtype=torch.float64) for level in (END, t))
    x_s = teacher.schedule.add_noise(clean, torch.randn_like(clean), s)
    x_t = teacher.schedule.renoise(x_s, torch.randn_like(x_s), s, times)
    network = Shifted(teacher, torch.quantile(x_t[:50_000, 0], torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)))
    (slope,) = torch.autograd.grad(loss(network, x_s, times, None, s), network.shifts)
    variance = t**2 - (1 - t) ** 2 * END**2 / (1 - END) ** 2
    weight = min(1.0, critics.SUBINTERVAL_CAP * variance)
    return float((slope / (2 * weight * 0.2)).abs().max())  # a fifth of the samples is in each range


def naive_loss(network: Denoiser, x_s: Tensor, t: Tensor, condition: Condition | None, s: Tensor | None, guidance_scale: float = 1.0) -> Tensor:
    """As if x_s were clean: the velocity noise − x_s (flow matching) is regressed at x_t = a x_s + b noise."""
    if s is None:
        return critics.denoising_loss(network, x_s, t, condition)
    schedule, noise = network.schedule, torch.randn_like(x_s)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.coefficients(x_s, s), schedule.coefficients(x_s, t)
    b = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp_min(1e-8).sqrt()
    x_t = (alpha_t / alpha_s * x_s + b * noise).to(x_s.dtype)
    target = schedule.convert(noise - x_s, x_t, t, "velocity", "x0").to(x_s.dtype)
    weight = (critics.SUBINTERVAL_CAP * b**2).clamp_max(1).to(x_s.dtype)
    return (weight * (network(x_t, t, condition) - target).square()).mean()


def target_checks() -> Iterator[Check]:
    """Where the critic comes to rest, though it never sees a clean sample."""
    for t in (0.55, 0.7, 0.9):
        yield at_most("phased_dmd", f"bias of the critic's target at t = {t}, of samples at s = 0.5", target_bias(critics.denoising_loss, t), 0.03)
    naive = min(target_bias(naive_loss, t) for t in (0.55, 0.7, 0.9))
    yield at_most("phased_dmd", "ablation: the target noise − x_s, at the best of these t", naive, 0.03, must_fail=True)


# -- a whole training ---------------------------------------------------------------------------------------------------


def informed(teacher: GaussianMixture, width: int = 64, steps: int = 400, batch: int = 256) -> MLPDenoiser:
    """A small network that has learnt the teacher's answers: what every role starts from."""
    torch.manual_seed(0)
    network = MLPDenoiser(teacher.schedule, 1, width, data_std=1.1)

    def loss() -> Tensor:
        x0, t = teacher.sample(batch), torch.rand(batch, dtype=torch.float64) * 0.98 + 0.01
        x_t = teacher.schedule.add_noise(x0, torch.randn_like(x0), t)
        return (network(x_t, t) - teacher(x_t, t)).square().mean()

    descend(network.parameters(), loss, steps, 5e-3, (0.9, 0.99))
    return network


def trained(start: MLPDenoiser, method: PhasedDMD, steps: int = 600, batch: int = 256, until: float = 1.0) -> Roles:
    """The roles after both phases, or after a part of the training."""
    torch.manual_seed(1)
    teacher, route = four_modes(), method.experts()
    assert isinstance(route, ByTime)
    roles = Roles(teacher, Routed([copy.deepcopy(start) for _ in range(route.count)], route), copy.deepcopy(start))
    roles.state = method.initial_state() | method.state_of(roles)
    rates = {"student": 2e-3, "critic": 4e-3}
    train(method, roles, lambda step: Batch(torch.randn(batch, 1), Condition()), steps, rates, betas=(0.0, 0.99), until=until)
    return roles


@torch.no_grad()
def rolled(student: Denoiser, ladder: tuple[float, ...], to: float, count: int = 100_000) -> Tensor:
    """(count, 1) where the deterministic steps of a ladder lead, down to ``to``."""
    x = torch.randn(count, 1, generator=torch.Generator().manual_seed(3))
    levels = torch.tensor([*ladder, to], dtype=torch.float64)
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        x0 = student(x, now)
        x = x0 if float(after) == 0 else student.schedule.ddim(x, x0, now.expand(count), after.expand(count))
    return x


def variation(x: Tensor, teacher: GaussianMixture, t: float, bins: int = 60) -> float:
    """Total variation distance of samples from the teacher's law at t, over bins of equal width."""
    edges = torch.linspace(-3.0, 4.0, bins + 1, dtype=torch.float64)
    alpha, sigma = (float(c) for c in teacher.schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
    std = ((alpha * teacher.stds) ** 2 + sigma**2).sqrt()
    below = torch.special.ndtr((edges[None] - alpha * teacher.means) / std)  # (modes, edges)
    mass = (teacher.log_weights.exp()[:, None] * below).sum(0).diff()
    found = torch.histc(x.double(), bins, -3.0, 4.0) / len(x)
    return 0.5 * float((found - mass).abs().sum())


def distance(x: Tensor, teacher: GaussianMixture) -> float:
    """1-Wasserstein distance of samples from the teacher's law."""
    theirs = teacher.sample(len(x), torch.Generator().manual_seed(5))
    return float((x.sort(0).values - theirs.sort(0).values).abs().mean())


def training_checks() -> Iterator[Check]:
    """The law where the first phase ends, and at the end."""
    teacher, method, ladder, bound = four_modes(), PhasedDMD(**SETTINGS), (1.0, END), 0.04
    start = informed(teacher)
    before = distance(rolled(start, ladder, 0.0), teacher)
    student = trained(start, method).student
    assert isinstance(student, Routed)
    swapped = Routed(student.experts[::-1], student.route)
    value = variation(rolled(student, ladder[:1], END), teacher, END)
    yield at_most("phased_dmd", "four modes, two phases: total variation from the teacher's law where the first one ends", value, bound)
    value = distance(rolled(student, ladder, 0.0), teacher) / before
    yield at_most("phased_dmd", "four modes, two phases: distance from the teacher's law at the end, over that before", value, 0.6)
    value = variation(rolled(swapped, ladder[:1], END), teacher, END)
    yield at_most("phased_dmd", "ablation: the two networks exchanged, where the first phase ends", value, bound, must_fail=True)
    with replaced(distribution, "denoising_loss", naive_loss):
        first = trained(start, method, until=0.5).student
    value = variation(rolled(first, ladder[:1], END), teacher, END)
    yield at_most("phased_dmd", "ablation: the first phase with the target noise − x_s", value, bound, must_fail=True)


def checks() -> Iterator[Check]:
    """All checks of the method."""
    yield from target_checks()
    yield from training_checks()
