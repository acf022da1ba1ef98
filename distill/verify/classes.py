"""Two classes N(±1, 1) of equal weight, and an affine student of both: what guidance does to the place where training ends.

    guided alike (VSD)          +1, 1 for every w, as teacher and critic agree there, whatever is made of their parts
    the teacher alone (DMD)     the best Gaussian, in reverse KL, for the tilted law p_c^w p_u^(1 − w): beyond its class, and narrower
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.analytic import AffineGenerator, GaussianMixture
from distill.denoiser import Condition, Prediction
from distill.methods.base import Batch
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles
from distill.schedule import EDM
from distill.verify.core import descend, replaced, student_loss
from distill.verify.dmd2 import independent_normals

SCHEDULE = EDM(sigma_min=1e-3, sigma_max=10.0)
SIGMA = 0.05  #: the noise level: next to none

#: w → mean and standard deviation where the teacher alone is guided, in the limit of small noise: the least KL(N(m, s²)‖p_c^w p_u^(1 − w)) by
#: quadrature. (The tilted law's own moments are 1.290, 0.863; 1.440, 0.803; 1.579, 0.754: it is no Gaussian.)
TILTED = {2.0: (1.290, 0.856), 3.0: (1.440, 0.786), 4.5: (1.581, 0.727)}


def level(sigma: float) -> float:
    """t of a noise level of the schedule."""
    return float((sigma ** (1 / SCHEDULE.rho) - SCHEDULE.low) / (SCHEDULE.high - SCHEDULE.low))


def two_classes(mean: Tensor | float = 1.0, std: Tensor | float = 1.0) -> GaussianMixture:
    """Class 0 is N(mean, std²), class 1 its mirror image, label 2 both."""
    mean, std = torch.as_tensor(mean).reshape(1), torch.as_tensor(std).reshape(1)
    return GaussianMixture(SCHEDULE, torch.stack([mean, -mean]), torch.stack([std, std]))


class MirroredGenerator(AffineGenerator):
    """x = ±(m + s z): the sign is the class."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        assert condition is not None
        labels = condition.values["class_labels"]
        assert isinstance(labels, Tensor)
        sign = (1.0 - 2.0 * labels.double())[:, None]
        made = super().predict(x_t, t, condition, features)
        return Prediction(sign * made.value, "x0", x_t, made.t, self.schedule)


class MirroredCritic(AffineGenerator):
    """The exact denoisers of both classes of a mirrored generator, and of its samples without a class, now."""

    def __init__(self, generator: MirroredGenerator) -> None:
        self.generator, self.schedule = generator, generator.schedule

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        exact = two_classes(self.generator.mean.detach(), self.generator.std.detach().abs())
        return exact.predict(x_t, t, condition, features)


def classes(count: int) -> Condition:
    """Labels 0 and 1 in turn; 2 says nothing."""
    return Condition({"class_labels": torch.arange(count) % 2}, {"class_labels": torch.full((count,), 2)})


def batch_of_classes(half: int) -> tuple[Batch, Tensor]:
    """(both classes from the same quasi-random noise, the noise to be added)."""
    z, noise = (v.repeat_interleave(2, 0) for v in independent_normals(half))
    return Batch(z, classes(2 * half)), noise


def end_point(method: DistributionMatching, steps: int = 120, half: int = 1024, start: tuple[float, float] = (1.2, 0.85)) -> tuple[float, float]:
    """(mean, width) of class 0 where the method takes the student, with an exact critic."""
    generator = MirroredGenerator(SCHEDULE, (start[0],), (start[1],))
    roles = Roles(two_classes(), generator, MirroredCritic(generator))
    batch, noise = batch_of_classes(half)
    with replaced(torch, "randn_like", lambda x: noise):
        descend(generator.parameters(), lambda: student_loss(method, roles, batch), steps, 0.04)
    return float(generator.mean.detach()), float(generator.std.detach())


def largest_error(found: tuple[float, float], wanted: tuple[float, float]) -> float:
    """Of two pairs of numbers, relative."""
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))
