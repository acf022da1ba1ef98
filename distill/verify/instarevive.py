"""InstaRevive's dynamic scope: where samples are near their goals, low noise knows the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from distill.analytic import GaussianMixture
from distill.denoiser import Condition, Denoiser, Prediction
from distill.matching.times import Scope, TimeLaw, Times, draw_times
from distill.methods.base import Batch
from distill.methods.instarevive import InstaRevive
from distill.roles import Roles
from distill.schedule import CosineVP, Kind, NoiseSchedule
from distill.verify.core import Check, at_most

MODES, STD = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.2
FULL = (0.02, 0.98)


class Placed(Denoiser):
    """A student that gives the samples that it holds."""

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule, samples: Tensor) -> None:
        self.schedule, self.samples = schedule, nn.Parameter(samples)

    def parameters(self) -> list[nn.Parameter]:
        return [self.samples]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        return Prediction(self.samples + 0 * x_t, "x0", x_t, t.expand(len(x_t)), self.schedule)


def cosine(law: TimeLaw, offset: float, count: int = 20_000) -> float:
    """Mean cosine between the way that the method moves samples and the way to their goals, with exact scores.

    Real samples y lie in two equal modes. The student's are y shifted by ``offset`` standard deviations across the line between the modes,
    and in the wrong proportions: 0.8 and 0.2. One in eight is ten times as far off: they set the scale.
    """
    torch.manual_seed(0)
    schedule = CosineVP()
    teacher = GaussianMixture(schedule, MODES, torch.full((2, 1), STD))
    goals = GaussianMixture(schedule, MODES, torch.full((2, 1), STD), torch.tensor([0.8, 0.2])).sample(count).double()
    far = torch.arange(count) % 8 == 0
    shift = torch.tensor([0.0, offset * STD], dtype=torch.float64) * torch.where(far, 10.0, 1.0)[:, None]
    means = torch.cat([MODES + shift[1], MODES + shift[0]]).double()
    critic = GaussianMixture(schedule, means, torch.full((4, 1), STD), torch.tensor([0.8 * 7, 0.2 * 7, 0.8, 0.2]))
    method = InstaRevive(score_times=law, weighting="none")
    student = Placed(schedule, goals + shift)
    roles = Roles(teacher, student, critic, state=method.initial_state())
    _, loss, _ = next(iter(method.step(roles, Batch(torch.randn(count, 2, dtype=torch.float64), Condition(), goals))))
    (gradient,) = torch.autograd.grad(loss, student.samples)
    return float(torch.cosine_similarity(-gradient[~far], -shift[~far]).mean())


def level(t: float) -> float:
    """The same at one level alone."""
    return cosine((t, t), 0.1)


def checks() -> Iterator[Check]:
    """The scope's own promise, and its limits."""
    scoped = Times(low=FULL[0], high=FULL[1], scope=Scope(against="data"))
    low, high = level(0.1), level(0.8)
    yield at_most("instarevive", f"samples 0.1 deviations off: cosine at high noise ({high:.3f}) over that at low noise ({low:.3f})", high / low, 0.6)
    yield at_most("instarevive", "scope: one minus the cosine", 1 - cosine(scoped, 0.1), 0.1)
    yield at_most("instarevive", "ablation: the full range", 1 - cosine(FULL, 0.1), 0.1, must_fail=True)
    exceeded = Times(low=FULL[0], high=FULL[1], scope=Scope(against="data", quantile=0.01, memory=0.0))
    yield at_most("instarevive", "ablation: a reference distance that every sample exceeds", 1 - cosine(exceeded, 0.1), 0.1, must_fail=True)
    schedule, like = CosineVP(), torch.zeros(1000, 1)
    below = Scope().below(FULL, torch.tensor([0.0, 1.0, 2.0]).repeat(1000)[:1000], torch.tensor(1.0))
    t = draw_times(scoped, like, schedule, below=below)
    yield at_most("instarevive", "largest t of samples at their goal", float(t[::3].max()), FULL[0] + 1e-9)
    yield at_most("instarevive", "the same seed, beyond the reference: largest difference from the plain law", _difference(like, schedule), 0.0)


def _difference(like: Tensor, schedule: NoiseSchedule) -> float:
    drawn = []
    for below in (None, Scope(memory=0.0, quantile=0.5).below(FULL, torch.full((1000,), 3.0), torch.tensor(0.0))):
        torch.manual_seed(0)
        drawn.append(draw_times(FULL, like, schedule, below=below))
    return float((drawn[0] - drawn[1]).abs().max())
