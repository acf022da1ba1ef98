"""PCM: phases and their exact maps, a deterministic sample, an adversary that is at rest where the phases agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.analytic import GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.losses.adversarial import Discriminator
from distill.matching.adversary import GAN
from distill.methods.base import Batch
from distill.methods.pcm import PCM
from distill.roles import Roles
from distill.sampling import renoise_sample
from distill.schedule import EDM, CosineVP, Flow, Kind, NoiseSchedule, double
from distill.verify.consistency import DATA, fit
from distill.verify.core import Check, at_most, between, student_loss


def checks() -> Iterator[Check]:
    yield from exact_checks()
    yield from trained_checks()
    yield from adversary_checks()


class ExactPhases(Denoiser):
    """The phased function that has converged: the x0-prediction that DDIM turns into the ODE's exact map to the phase's edge."""

    kind: Kind = "x0"

    def __init__(self, teacher: GaussianMixture, phases: int) -> None:
        self.teacher, self.phases, self.schedule = teacher, phases, teacher.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t = double(t).expand(len(x_t))
        edge = ((t * self.phases - 1e-6).ceil() - 1).clamp_min(0) / self.phases
        (alpha_t, sigma_t), (alpha_e, sigma_e) = self.schedule.coefficients(x_t, t), self.schedule.coefficients(x_t, edge)
        there, ratio = self.teacher.flow_map(x_t, t, edge), sigma_e / sigma_t
        x0 = torch.where(edge[:, None] == 0, there, (there - ratio * x_t) / (alpha_e - alpha_t * ratio))
        return Prediction(x0, "x0", x_t, t, self.schedule)


def residual(schedule: NoiseSchedule, method: PCM, student: Denoiser | None = None) -> float:
    """Root of the squared loss."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    batch = Batch(torch.randn(2000, 2, dtype=torch.float64), Condition(), teacher.sample(2000).double())
    return float(student_loss(method, Roles(teacher, student or ExactPhases(teacher, 4)), batch).detach()) ** 0.5


def exact_checks() -> Iterator[Check]:
    fine = PCM(discretization=(256, 256), solver="heun", metric="l2")
    for schedule in (CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow()):
        name, teacher = type(schedule).__name__, gaussian(schedule, *DATA)
        yield at_most("pcm", f"residual of the exact maps to the phases' edges, {name}", residual(schedule, fine), 1e-4)
        noise, one = torch.randn(64, 2, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
        made = renoise_sample(ExactPhases(teacher, 4), fine.sampler().ladder(), noise, None, gamma=fine.sampler().gamma)
        exact = teacher.flow_map(noise * schedule.initial_scale, one, 0 * one)
        yield at_most("pcm", f"four-step samples of these against the exact map, {name}: largest error", float((made - exact).abs().max()), 1e-6)
    to_data = residual(Flow(), fine.model_copy(update={"segments": [1]}))
    yield at_most("pcm", "ablation: the same student, every edge at the data", to_data, 1e-4, must_fail=True)
    teacher = gaussian(CosineVP(), *DATA)
    steps = PCM(discretization=(8, 8), segments=[8], steps=8, metric="l2")
    yield at_most("pcm", "as many phases as intervals: the loss of the teacher itself", residual(CosineVP(), steps, teacher), 1e-6)


def chain_error(segments: list[int], steps: int = 1500) -> float:
    """RMS of four deterministic steps of a trained student against the exact map, over the data's deviation."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), *DATA)
    student, target = (MLPDenoiser(CosineVP(), 2, width=64, data_std=0.8) for _ in range(2))
    method = PCM(segments=segments, discretization=(8, 8), solver="heun", metric="l2", gamma=0.0)
    fit(method, Roles(teacher, student, target=target), lambda step: Batch(torch.randn(512, 2), Condition(), teacher.sample(512)), steps)
    noise, one = torch.randn(4000, 2), torch.ones(4000, dtype=torch.float64)
    with torch.no_grad():
        made = renoise_sample(student, method.sampler().ladder(), noise, None, gamma=0.0)
        again = renoise_sample(student, method.sampler().ladder(), noise, None, gamma=0.0)
    assert torch.equal(made, again)  # no noise but the first
    exact = teacher.flow_map(noise, one, 0 * one)
    return float((made - exact).square().mean().sqrt() / (exact - exact.mean(0)).square().mean().sqrt())


def trained_checks() -> Iterator[Check]:
    """A consistency function to the data is no velocity: its deterministic steps go wrong. A phased one's do not."""
    yield at_most("pcm", "four phases, trained: four deterministic steps against the exact map", chain_error([4]), 0.02)
    yield at_most("pcm", "ablation: one phase, the same steps", chain_error([1], 800), 0.02, must_fail=True)


def told_apart(real: str, steps: int = 150) -> float:
    """Accuracy of a discriminator at the exact phased maps, when the data are others than the teacher's."""
    torch.manual_seed(0)
    teacher, data = gaussian(CosineVP(), *DATA), gaussian(CosineVP(), (-0.7, 0.9), (0.3, 0.4))
    gan = GAN(features="teacher", layers=["state"], loss="hinge", real=real)  # type: ignore[arg-type]
    roles: Any = Roles(teacher, ExactPhases(teacher, 4), discriminator=Discriminator({"state": (3,)}))
    method, found = PCM(gan=gan, discretization=(256, 256), solver="heun"), []
    optimizer = torch.optim.Adam(roles.parameters("discriminator"), 3e-3)
    for _ in range(steps):
        for role, loss, logs in method.step(roles, Batch(torch.randn(256, 2), Condition(), data.sample(256))):
            if role == "discriminator":
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(float(logs["accuracy"]))
    return sum(found[-50:]) / 50


def adversary_checks() -> Iterator[Check]:
    yield between("pcm", "adversary at the exact maps, real: the target; its accuracy", told_apart("target"), 0.48, 0.52)
    yield between("pcm", "ablation: real: data, which the teacher does not fit", told_apart("data"), 0.48, 0.52, must_fail=True)
