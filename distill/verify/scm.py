"""sCM: the tangent at the exact map, the limit of the discrete loss, the trained map, and what the normalisation is for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill.analytic import ExactMap, GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition, Denoiser
from distill.mapping.tangent import Tangent, field, tangent
from distill.methods.base import Batch
from distill.methods.consistency import Consistency
from distill.methods.scm import SCM
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.consistency import DATA, map_error
from distill.verify.core import Check, at_most, between, student_loss, train

SCHEDULES: tuple[NoiseSchedule, ...] = (CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow())
RAW = Tangent(c=None, adaptive=False, warmup=0.0)


def checks() -> Iterator[Check]:
    yield from tangent_checks()
    yield from guidance_checks()
    yield from limit_checks()
    yield from denoising_checks()
    yield from map_checks()
    yield from size_checks()


def tangent_size(schedule: NoiseSchedule, student: Denoiser | None = None, data_std: float = 0.8) -> float:
    """Largest |g| along the teacher's velocity, at any level."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    t = torch.linspace(0.01, 1.0, 200, dtype=torch.float64)
    x_t = schedule.add_noise(teacher.sample(200).double(), torch.randn(200, 2, dtype=torch.float64), t)
    truth = field(teacher.predict(x_t, t), data_std)
    return float(tangent(student or ExactMap(teacher), truth, x_t, t, None, 1.0, Tangent(data_std=data_std))[1].abs().max())


def tangent_checks() -> Iterator[Check]:
    """g = 0 at the ODE's exact map, whatever the schedule and its unit."""
    for schedule in SCHEDULES:
        yield at_most("scm", f"largest tangent at the exact map, {type(schedule).__name__}", tangent_size(schedule), 1e-6)
    teacher = gaussian(Flow(), *DATA)
    yield at_most("scm", "ablation: at the teacher's own x0-prediction", tangent_size(Flow(), teacher), 1e-6, must_fail=True)
    wrong = ExactMap(gaussian(Flow(), (0.5, -0.3), (0.6, 1.0)))
    yield at_most("scm", "ablation: at the map of a Gaussian a tenth wider", tangent_size(Flow(), wrong), 1e-6, must_fail=True)


def guided_tangent(scale: float, told: bool) -> float:
    """Root of sCM's loss, that is the size of g, at the exact map of the w = 2.5 ODE: two classes of equal spread, one the null one,
    whose guided ODE is that of N(mu_0 + w (mu_c − mu_0), s²)."""
    torch.manual_seed(0)
    teacher = GaussianMixture(CosineVP(), torch.tensor([[0.4, 0.2], [-0.2, 0.1]]), torch.full((2, 1), 0.8))
    mean = teacher.means[1] + 2.5 * (teacher.means[0] - teacher.means[1])
    labels = torch.zeros(512, dtype=torch.long)
    condition = Condition({"class_labels": labels}, {"class_labels": labels + 1})
    x0 = (teacher.means[:1] + 0.8 * torch.randn(512, 2)).double()
    method = SCM(tangent=RAW, train_times=(0.05, 1.0), guidance_scale=1.0 if told else scale, guidance_range=(scale, scale + 1e-9) if told else None)
    roles = Roles(teacher, ExactMap(gaussian(CosineVP(), mean.tolist(), (0.8, 0.8))))
    return float(student_loss(method, roles, Batch(torch.randn(512, 2).double(), condition, x0))) ** 0.5


def guidance_checks() -> Iterator[Check]:
    """Guidance is the ODE's, at a fixed scale and at one that is drawn."""
    for told in (False, True):
        yield at_most("scm", f"tangent at the guided ODE's exact map, w = 2.5 {'drawn' if told else 'fixed'}", guided_tangent(2.5, told), 1e-6)
    yield at_most("scm", "ablation: the same map at w = 1", guided_tangent(1.0, False), 1e-6, must_fail=True)


def gradient(method: Consistency, roles: Roles, batch: Batch) -> Tensor:
    """Of the student's loss, in one vector."""
    torch.manual_seed(1)
    roles.state = method.initial_state()
    return torch.cat([g.flatten() for g in torch.autograd.grad(student_loss(method, roles, batch), roles.parameters("student"))])


def cosine(intervals: int, level: float = 0.5) -> float:
    """Between the gradients of sCM's loss and of the discrete one with so many intervals, at one noise level, for a random network."""
    torch.manual_seed(0)
    teacher = gaussian(Flow(), *DATA)
    network = MLPDenoiser(Flow(), 2, 32, 0.8)
    batch = Batch(torch.randn(256, 2, dtype=torch.float64), Condition(), teacher.sample(256).double())
    network.double()
    # float64 throughout: at 1000 intervals the two points lie near each other
    own = _Double(network)
    settings: dict[str, Any] = {"steps": 1, "train_times": (level, level), "target": "stop_gradient"}
    discrete = Consistency(discretization=(intervals, intervals), metric="l2", **settings)
    a, b = (gradient(m, Roles(teacher, own), batch) for m in (discrete, SCM(tangent=RAW, **settings)))
    return float(nn.functional.cosine_similarity(a, b, dim=0))


class _Double(Denoiser):
    """A network in float64."""

    def __init__(self, network: MLPDenoiser) -> None:
        self.network, self.schedule, self.kind = network, network.schedule, network.kind

    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Any = ()) -> Any:
        inputs = self.network.inputs
        self.network.inputs = lambda *args: inputs(*args).double()  # type: ignore[method-assign]
        try:
            return self.network.predict(x_t, t.expand(len(x_t)), condition, features)
        finally:
            self.network.inputs = inputs  # type: ignore[method-assign]


def limit_checks() -> Iterator[Check]:
    yield between("scm", "cosine with the discrete loss's gradient, 1000 intervals", cosine(1000), 0.999, 1.0)
    yield between("scm", "ablation: two intervals", cosine(2), 0.999, 1.0, must_fail=True)


def denoising_cosine(strength: float) -> float:
    """Between the gradient on real data and that of denoising in F, at a share r of the derivative."""
    torch.manual_seed(0)
    teacher, network = gaussian(CosineVP(), *DATA), MLPDenoiser(CosineVP(), 2, 32, 0.8)
    x0, noise = teacher.sample(256), torch.randn(256, 2)
    roles = Roles(teacher, network)
    method = SCM(tangent=Tangent(c=None, adaptive=False, warmup=1.0), train_times=(0.4, 0.4), solver="data")
    mine = gradient(method, roles, Batch(noise, Condition(), x0, strength))
    t = torch.full((256,), 0.4, dtype=torch.float64)
    x_t = roles.schedule.add_noise(x0, noise, t)
    v = roles.schedule.convert(x0, x_t, t, "x0", "v").float()
    plain = torch.autograd.grad((network.predict(x_t, t).v - v).square().mean(), roles.parameters("student"))
    return float(nn.functional.cosine_similarity(mine, torch.cat([g.flatten() for g in plain]), dim=0))


def denoising_checks() -> Iterator[Check]:
    """The start of the warm-up, r = 0, on real data: v-prediction."""
    yield between("scm", "real data, r = 0: cosine with the gradient of v-prediction", denoising_cosine(0.0), 0.9999, 1.0)
    yield between("scm", "ablation: r = 1", denoising_cosine(1.0), 0.9999, 1.0, must_fail=True)


def trained(schedule: NoiseSchedule, method: SCM, steps: int, batch: int, rate: float = 4e-3) -> tuple[GaussianMixture, MLPDenoiser]:
    """(teacher, student) after training an MLP on a Gaussian."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    student = MLPDenoiser(schedule, 2, width=64, data_std=0.8)
    roles = Roles(teacher, student)
    roles.state = method.initial_state()
    kept = train(method, roles, lambda step: Batch(torch.randn(batch, 2), Condition(), teacher.sample(batch)), steps, {"student": rate}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), kept, strict=True):
            p.copy_(value)
    return teacher, student


#: the tangent as it is: two dimensions need no normalisation, and converge faster without
PLAIN = SCM(tangent=Tangent(c=None, adaptive=False, data_std=0.8), train_times=(0.0, 1.0))


def map_checks() -> Iterator[Check]:
    """One evaluation gives what the ODE gives; without the derivative it gives the posterior mean."""
    yield at_most("scm", "trained map against the exact PF-ODE map, CosineVP", map_error(*trained(CosineVP(), PLAIN, 2600, 256, 2e-3)), 0.02)
    yield from short_checks()


def short_checks() -> Iterator[Check]:
    for schedule in (EDM(sigma_min=0.01, sigma_max=10.0), Flow()):
        yield at_most("scm", f"the same after 500 steps, {type(schedule).__name__}", map_error(*trained(schedule, PLAIN, 500, 256)), 0.35)
    never = PLAIN.model_copy(update={"tangent": Tangent(c=None, adaptive=False, data_std=0.8, calm_down=(0.0, 0.0))})
    yield at_most("scm", "ablation: without the derivative from the start", map_error(*trained(Flow(), never, 500, 256)), 0.35, must_fail=True)


def spikes(c: float | None) -> float:
    """Largest over the median norm of the gradient, over random levels near pure noise and a network with a steep time embedding."""
    torch.manual_seed(0)
    teacher, network = gaussian(CosineVP(), *DATA), MLPDenoiser(CosineVP(), 2, 32, 0.8)
    with torch.no_grad():
        next(iter(network.parameters()))[:, 2:] *= 100  # the first layer's, on the embedding
    method, norms = SCM(tangent=Tangent(c=c, adaptive=False, warmup=0.0), train_times=(0.0, 1.0)), []
    for _ in range(200):
        batch = Batch(torch.randn(1, 2), Condition(), teacher.sample(1))
        loss = student_loss(method, Roles(teacher, network), batch)
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]).norm())
    found = torch.stack(norms)
    return float(found.max() / found.median())


def size_checks() -> Iterator[Check]:
    yield at_most("scm", "steep time embedding: largest over median gradient norm of a sample", spikes(0.1), 4)
    yield at_most("scm", "ablation: the tangent as it is", spikes(None), 4, must_fail=True)
