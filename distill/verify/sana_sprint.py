"""SANA-Sprint: the algebra that makes a flow-matching teacher a TrigFlow one, and the adversary that sees pure noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.analytic import AffineGenerator, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.losses.adversarial import Discriminator
from distill.mapping.tangent import angle, circle, field
from distill.matching.adversary import GAN
from distill.methods.base import Batch
from distill.methods.sana_sprint import SanaSprint
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, Kind, NoiseSchedule
from distill.verify.consistency import DATA
from distill.verify.core import Check, at_most, between


def checks() -> Iterator[Check]:
    yield from algebra_checks()
    yield from path_checks()
    yield from start_checks()


def algebra_error(exchanged: bool = False) -> float:
    """F of a random velocity against the paper's formula, in TrigFlow with sd = 0.5:

    tau = sin phi/(sin phi + cos phi),  x_FM = (x/sd) √(tau² + (1 − tau)²),  F = [(1 − 2 tau) x_FM + (1 − 2 tau + 2 tau²) v]/√(tau² + (1 − tau)²)

    The paper's samples are the data times sd: its x/sd is a point between data of deviation one and unit noise.
    """
    torch.manual_seed(0)
    schedule, phi = Flow(), torch.linspace(0.01, 1.57, 100, dtype=torch.float64)
    tau = phi.sin() / (phi.sin() + phi.cos())
    x, v = torch.randn(100, 3, dtype=torch.float64), torch.randn(100, 3, dtype=torch.float64)
    a = tau[:, None]
    norm = (a**2 + (1 - a) ** 2).sqrt()
    wanted = ((1 - 2 * a) * x * norm + (1 - 2 * a + 2 * a**2) * v) / norm
    found = field(Prediction(v, "velocity" if not exchanged else "v", x * norm, tau, schedule), 1.0)
    return float((found - wanted).abs().max() + (angle(schedule, tau, 1.0) - phi).abs().max())


def algebra_checks() -> Iterator[Check]:
    yield at_most("sana_sprint", "flow matching in TrigFlow's coordinates, against the paper's formula", algebra_error(), 1e-9)
    yield at_most("sana_sprint", "ablation: the velocity taken for a v-prediction", algebra_error(True), 1e-9, must_fail=True)


def path_error(schedule: NoiseSchedule, steps: int = 400) -> float:
    """The teacher's ODE solved in TrigFlow's own coordinates, dx/dphi = F, by Heun's rule, against its exact map."""
    teacher, sd = gaussian(schedule, *DATA), 0.8
    torch.manual_seed(0)
    times = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)[:, None].expand(-1, 64)
    start = schedule.add_noise(teacher.sample(64).double(), torch.randn(64, 2, dtype=torch.float64), times[0])

    def speed(x: Tensor, t: Tensor) -> Tensor:
        return field(teacher.predict(x * circle(schedule, x, t, sd)[2], t), sd)

    x = start / circle(schedule, start, times[0], sd)[2]
    for t, s in zip(times[:-1], times[1:], strict=True):
        turn = (angle(schedule, s, sd) - angle(schedule, t, sd))[:, None]
        first = speed(x, t)
        x = x + 0.5 * turn * (first + speed(x + turn * first, s))
    end = x * circle(schedule, x, times[-1], sd)[2]
    exact = teacher.flow_map(start, times[0], times[-1])
    return float((end - exact).abs().max() / exact.abs().max())


def path_checks() -> Iterator[Check]:
    for schedule in (CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow()):
        yield at_most("sana_sprint", f"the teacher's ODE in TrigFlow against its exact map, {type(schedule).__name__}", path_error(schedule), 1e-3)


class _Noting(Denoiser):
    """Notes the noise levels that it is asked at."""

    kind: Kind = "x0"

    def __init__(self, student: AffineGenerator) -> None:
        self.student, self.schedule, self.asked = student, student.schedule, []  # type: ignore[var-annotated]

    def parameters(self) -> Any:
        return self.student.parameters()

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        self.asked.append(float((t == 1).double().sum()))
        return self.student.predict(x_t, t, condition, features)


def asked_at_start(share: float) -> float:
    """Of 64 judged samples, how many the student makes of pure noise."""
    torch.manual_seed(0)
    teacher = gaussian(Flow(), *DATA)
    student = _Noting(AffineGenerator(Flow(), (0.0, 0.0), (1.0, 1.0)))
    roles = Roles(teacher, student, discriminator=Discriminator({"state": (3,)}))
    method = SanaSprint(gan=GAN(weight=0.5, features="teacher", layers=["state"], loss="hinge"), gan_at_start=share)
    roles.state = method.initial_state()
    next(iter(method.step(roles, Batch(torch.randn(64, 2), Condition(), teacher.sample(64)))))
    return student.asked[-1]


def start_checks() -> Iterator[Check]:
    yield between("sana_sprint", "samples of pure noise among 64 that the adversary judges", asked_at_start(0.5), 32, 32)
    yield between("sana_sprint", "ablation: gan_at_start 0", asked_at_start(0.0), 32, 32, must_fail=True)
