"""SiD-LSG: a critic that is guided in its own loss makes the guided teacher's law the fixed point, where one that learns unguided does not.

Teacher with Gaussian denoisers: N(1, 1) for its class, N(0, 4) for none. Guided, its score at a noise level is that of

    precision P = w/(alpha² + sigma²) + (1 − w)/(4 alpha² + sigma²),     mean w alpha/(alpha² + sigma²)/P,

a Gaussian that an affine student can reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from distill.analytic import AffineGenerator, GaussianMixture, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.matching.critic import denoising_loss
from distill.methods.base import Batch
from distill.methods.sid_lsg import SiDLSG
from distill.roles import Roles
from distill.schedule import CosineVP, Kind
from distill.verify.classes import largest_error
from distill.verify.core import Check, at_most, descend, replaced, student_loss
from distill.verify.dmd2 import independent_normals

SCHEDULE, LEVEL, SCALE = CosineVP(), 0.4, 2.0


def with_null(count: int) -> Condition:
    """Label 0 is the class, 1 is none."""
    return Condition({"class_labels": torch.zeros(count, dtype=torch.long)}, {"class_labels": torch.ones(count, dtype=torch.long)})


def by_label(x_t: Tensor, t: Tensor, condition: Condition | None, told: Tensor, null: Tensor) -> Prediction:
    assert condition is not None
    labels = condition.values["class_labels"]
    assert isinstance(labels, Tensor)
    return Prediction(torch.where(labels[:, None] == 0, told, null), "x0", x_t, t.expand(len(x_t)), SCHEDULE)


class TwoLaws(Denoiser):
    """The denoiser of N(1, 1) with its condition, of N(0, 4) without."""

    kind: Kind = "x0"
    schedule = SCHEDULE
    told, null = gaussian(SCHEDULE, (1.0,), (1.0,)), gaussian(SCHEDULE, (0.0,), (2.0,))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        return by_label(x_t, t, condition, self.told.predict(x_t, t).x0, self.null.predict(x_t, t).x0)


class AffineCritic(Denoiser):
    """D_c = a + b x_t and D_u = 0.3 x_t at one noise level: the class's part is trained."""

    kind: Kind = "x0"
    schedule = SCHEDULE

    def __init__(self) -> None:
        self.a, self.b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def parameters(self) -> list[nn.Parameter]:
        return [self.a, self.b]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        return by_label(x_t, t, condition, self.a + self.b * x_t, 0.3 * x_t)


def learnt(guidance: float, law: GaussianMixture, w: float = SCALE) -> float:
    """How far the critic's *guided* answer is from the denoiser of the student's law once its loss is least (two Newton steps of
    a quadratic), on average."""
    critic, t = AffineCritic(), torch.tensor(LEVEL, dtype=torch.float64)
    z, noise = independent_normals(4096)
    x = law.means[0] + law.stds[0] * z
    with replaced(torch, "randn_like", lambda like: noise):
        for _ in range(2):
            loss = denoising_loss(critic, x, t.expand(len(x)), with_null(len(x)), guidance_scale=guidance)
            gradient = torch.cat(torch.autograd.grad(loss, critic.parameters(), create_graph=True))
            curvature = torch.stack([torch.cat(torch.autograd.grad(g, critic.parameters(), retain_graph=True)) for g in gradient])
            with torch.no_grad():
                for p, move in zip(critic.parameters(), torch.linalg.solve(curvature, gradient), strict=True):
                    p.sub_(move)
    x_t = SCHEDULE.add_noise(x, noise, t)
    told = critic.predict(x_t, t, with_null(len(x))).x0
    null = critic.predict(x_t, t, with_null(len(x)).unconditional()).x0
    return float((null + w * (told - null) - law.predict(x_t, t).x0).detach().square().mean().sqrt())


class GuidedCritic(Denoiser):
    """The critic that has converged under guidance: D_u + w (D_c − D_u) is the denoiser of the student's law."""

    kind: Kind = "x0"
    schedule = SCHEDULE

    def __init__(self, generator: AffineGenerator, w: float) -> None:
        self.generator, self.w = generator, w

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        exact = gaussian(SCHEDULE, self.generator.mean.tolist(), self.generator.std.abs().tolist()).predict(x_t, t).x0
        null = 0.3 * x_t
        return by_label(x_t, t, condition, null + (exact - null) / self.w, null)


def end_point(trained_with: float, steps: int = 250) -> tuple[float, float]:
    """(mean, width) of the student where the method takes it, with a critic that has learnt at this guidance."""
    generator = AffineGenerator(SCHEDULE, (0.6,), (1.1,))
    roles = Roles(TwoLaws(), generator, GuidedCritic(generator, trained_with))
    method = SiDLSG(guidance_scale=SCALE, weighting="exact", score_times=(LEVEL, LEVEL))
    z, noise = independent_normals(2048)
    with replaced(torch, "randn_like", lambda like: noise):
        descend(generator.parameters(), lambda: student_loss(method, roles, Batch(z, with_null(len(z)))), steps, 0.04)
    return float(generator.mean.detach()), float(generator.std.detach().abs())


def checks() -> Iterator[Check]:
    alpha, sigma = (float(c) for c in SCHEDULE.alpha_sigma(torch.tensor(LEVEL, dtype=torch.float64)))
    told, null = alpha**2 + sigma**2, 4 * alpha**2 + sigma**2
    precision = SCALE / told + (1 - SCALE) / null
    wanted = (SCALE / told / precision, math.sqrt(1 / precision - sigma**2) / alpha)
    law = gaussian(SCHEDULE, (0.7,), (0.8,))
    yield at_most("sid_lsg", "guided in its loss: the guided critic against the student's denoiser", learnt(SCALE, law), 2e-3)
    yield at_most("sid_lsg", "ablation: a critic that learns unguided, guided", learnt(1.0, law), 2e-3, must_fail=True)
    found = end_point(SCALE)
    yield at_most("sid_lsg", f"the student ends at the guided teacher's law {wanted[0]:.3f}, {wanted[1]:.3f}", largest_error(found, wanted), 5e-3)
    plain = end_point(1.0)
    yield at_most("sid_lsg", f"ablation: a critic that learnt unguided: {plain[0]:.3f}, {plain[1]:.3f}", largest_error(plain, wanted), 5e-3, must_fail=True)
