"""DisBack on a teacher that is wrong far from its data: the recorded path leads a far student home."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.analytic import AffineGenerator
from distill.denoiser import Condition, Denoiser, Prediction
from distill.methods.base import Batch
from distill.methods.disback import DisBack
from distill.methods.distribution import DistributionMatching
from distill.methods.dmd2 import DMD2
from distill.roles import Roles
from distill.schedule import CosineVP, Kind, NoiseSchedule
from distill.verify.core import Check, at_most, replaced, train

START = 6.0  #: mean of the untrained student; the teacher's data are N(0, 1)
EDGE = 3.0


class Nearsighted(Denoiser):
    """The denoiser of N(m, 1), but beyond |x_t| = 3 mixed with garbage: (1 − e) D + e (x_t/alpha + 6 cos 5 x_t). With the teacher's e = 1
    the score there is noise of mean zero, and no way leads home. Both numbers are weights that training changes."""

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.weights = {k: nn.Parameter(torch.tensor(v, dtype=torch.float64)) for k, v in (("mean", 0.0), ("error", 1.0))}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self.weights

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        mean, error = self.parameters()
        t = t.expand(len(x_t))
        alpha, sigma = self.schedule.coefficients(x_t, t)
        right = mean + alpha / (alpha**2 + sigma**2) * (x_t - alpha * mean)
        garbage = x_t / alpha + 6 * torch.cos(5 * x_t)
        x0 = right + error * (x_t.abs() > EDGE) * (garbage - right)
        return Prediction(x0, "x0", x_t, t, self.schedule)


class Mover(AffineGenerator):
    """x = m + z: a student that learns its mean."""

    def parameters(self) -> list[nn.Parameter]:
        return [self.mean]


#: Low noise alone: at higher levels the noised samples reach where the teacher is right, and plain distillation crawls home, too.
SETTINGS: dict[str, Any] = {"weighting": "exact", "score_times": (0.15, 0.3), "critic_times": (0.15, 0.3), "critic_steps": 4}

#: The path is as long as the copy needs to forget: longer, and all that is recorded is the student's own score.
RECORDING = 0.08


def trained(method: DistributionMatching, until: float = 1.0, steps: int = 400, batch: int = 128) -> Roles:
    """The roles after training a student that starts at mean 6, up to a share of the training."""
    torch.manual_seed(0)
    schedule = CosineVP()
    teacher, critic, target = (Nearsighted(schedule) for _ in range(3))
    roles = Roles(teacher, Mover(schedule, (START,), (1.0,)), critic, target if "target" in method.roles else None)
    roles.state = method.initial_state() | method.state_of(roles)

    def draw(step: int) -> Batch:
        return Batch(torch.randn(batch, 1, dtype=torch.float64), Condition())

    stop = round(until * steps)
    if stop < steps:  # the beginning alone, at the pace of the whole
        part = method.step

        def first(self: DistributionMatching, roles: Roles, batch: Batch) -> object:
            return part(roles, Batch(batch.noise, batch.condition, progress=batch.progress * until))

        with replaced(type(method), "step", first):
            train(method, roles, draw, stop, {"student": 0.06, "critic": 0.06}, betas=(0.5, 0.99), decay=False)
    else:
        train(method, roles, draw, steps, {"student": 0.06, "critic": 0.06}, betas=(0.5, 0.99))
    return roles


def error(roles: Roles) -> float:
    """The student's distance from the teacher's mean, 0."""
    student = roles.student
    assert isinstance(student, Mover)
    return float(student.mean.detach().abs())


def path_checks() -> Iterator[Check]:
    """The recorded teachers go from the teacher to the student's law in order, and the nearest one pulls softly."""
    method = DisBack(**SETTINGS, recording=RECORDING)
    roles = trained(method, until=RECORDING)
    assert roles.critic is not None
    means = [0.0, *(float(roles.state[f"teacher_{i}/mean"]) for i in range(1, method.teachers)), float(next(iter(roles.critic.parameters())).detach())]  # type: ignore[attr-defined]
    falls = sum(b <= a for a, b in zip(means[:-1], means[1:], strict=True))
    yield at_most("disback", f"recorded means {', '.join(f'{m:.2f}' for m in means)}: how often they fall", falls, 0)
    yield at_most("disback", "distance of the last one from the student's mean", abs(means[-1] - START), 0.3)
    student = roles.student
    assert isinstance(student, Mover)
    yield at_most("disback", "how far the student moved while the path was recorded", abs(float(student.mean.detach()) - START), 0.0)


def checks() -> Iterator[Check]:
    """All checks of the method."""
    yield from path_checks()
    bound = 0.1
    value = error(trained(DisBack(**SETTINGS, recording=RECORDING)))
    yield at_most("disback", "student from mean 6, teacher wrong beyond 3: its mean after training", value, bound)
    yield at_most("disback", "ablation: no path, the teacher from the start (DMD2)", error(trained(DMD2(**SETTINGS))), bound, must_fail=True)
    with replaced(DisBack, "_record", lambda self, roles, progress: None):
        value = error(trained(DisBack(**SETTINGS, recording=RECORDING)))
    yield at_most("disback", "ablation: a path of copies of the teacher", value, bound, must_fail=True)
