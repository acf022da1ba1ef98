"""ESD on the guide's toy: 64 points, one for each condition, and a teacher N(0, 1) that does not know the condition.

At one noise level E_c KL(q(x|c)‖p) − lambda I(x; c) of points with spread s, taken as a Gaussian, is up to constants

    ½ (alpha² s² + sigma²)/(alpha² + sigma²) − ½ lambda log(alpha² s² + sigma²),

least where alpha² s² + sigma² = lambda (alpha² + sigma²): s = 0 for VSD (every condition in one place), 1 for lambda = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from distill.analytic import GaussianMixture, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.methods.base import Batch
from distill.methods.esd import ESD
from distill.methods.vsd import VSD
from distill.roles import Roles
from distill.schedule import CosineVP, Kind
from distill.verify.core import Check, at_most, descend, replaced, student_loss

POINTS = 64
SCHEDULE = CosineVP()
LEVEL = 0.35


class Points(Denoiser):
    """One point for each condition, whatever the noise."""

    kind: Kind = "x0"

    def __init__(self) -> None:
        self.schedule = SCHEDULE
        self.places = nn.Parameter(0.3 * torch.special.ndtri((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)[:, None])

    def parameters(self) -> list[nn.Parameter]:
        return [self.places]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        assert condition is not None
        return Prediction(self.places[condition.values["class_labels"]], "x0", x_t, t, self.schedule)


class ExactPoints(Denoiser):
    """The critic that has converged: a point's denoiser is the point, that of all is their mixture's."""

    kind: Kind = "x0"

    def __init__(self, points: Points) -> None:
        self.points, self.schedule = points, points.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        places = self.points.places.detach()
        return GaussianMixture(self.schedule, places, torch.full_like(places, 1e-6)).predict(x_t, t, condition)


class Unaware(Denoiser):
    """A teacher that does not hear the condition."""

    kind: Kind = "x0"

    def __init__(self, law: GaussianMixture) -> None:
        self.law, self.schedule = law, law.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        return self.law.predict(x_t, t, None, features)


def spread(method: ESD | VSD, steps: int = 100, copies: int = 16) -> float:
    """Standard deviation of the points where the method takes them; each is noised by the same quantiles of the normal law."""
    points = Points()
    roles = Roles(Unaware(gaussian(SCHEDULE, (0.0,), (1.0,))), points, ExactPoints(points))
    labels = torch.arange(POINTS).repeat(copies)
    noise = torch.special.ndtri((torch.arange(copies, dtype=torch.float64) + 0.5) / copies).repeat_interleave(POINTS)[:, None]
    batch = Batch(noise, Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, POINTS)}))
    with replaced(torch, "randn_like", lambda x: noise):
        descend(points.parameters(), lambda: student_loss(method, roles, batch), steps, 0.05)
    return float(points.places.detach().std())


def checks() -> Iterator[Check]:
    alpha, sigma = (float(c) for c in SCHEDULE.alpha_sigma(torch.tensor(LEVEL, dtype=torch.float64)))
    times = (LEVEL, LEVEL)
    for strength in (0.0, 0.5, 1.0):
        wanted = math.sqrt(max(strength * (alpha**2 + sigma**2) - sigma**2, 0) / alpha**2)
        found = spread(ESD(critic_guidance_scale=1 - strength, score_times=times))
        yield at_most("esd", f"lambda {strength:g}: spread {found:.3f} of the points, off the closed form {wanted:.3f} by", abs(found - wanted), 0.06)
        if not strength:
            yield at_most("esd", "ablation: no entropy term reaches the teacher's spread", abs(found - 1), 0.1, must_fail=True)
            plain = spread(VSD(guidance_scale=1.0, critic_guidance_scale=1.0, critic_null=0.3, score_times=times))
            yield at_most("esd", "lambda 0 against VSD without guidance", abs(plain - found), 0)
