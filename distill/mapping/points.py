"""Where the states x_t come from that a student learns at: real samples and noise, or the teacher's own way from noise to samples.

The second needs no images, no autoencoder and no further call of the teacher: what it said on its way is the step, or the tangent
(Xie et al. 2024, MLCM, arXiv 2406.05768; Tang et al. 2025, TBCM, arXiv 2511.20410). And it is where the student will be asked:
noised data lie where the teacher's ODE would lead only if the teacher is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.schedule import NoiseSchedule


class Trajectories(BaseModel):
    """The teacher's own trajectories, all of them from pure noise."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    steps: Annotated[int, Field(ge=1)] = 8  #: of each; one time is drawn in each of so many equal parts of [0, 1]
    points: Annotated[int, Field(ge=1)] | None = None  #: that are learnt of each, drawn anew; all if not given: so many times trainer.batch_size
    shift: Annotated[float, Field(gt=0)] = 1.0  #: t → shift t / (1 + (shift − 1) t): above 1 more of the steps lie where noise is high


@dataclass(frozen=True)
class Points:
    """States of the process."""

    x_t: Tensor  #: (batch, ...)
    t: Tensor  #: (batch,), float64
    condition: Condition
    said: Tensor | None = None  #: (batch, ...) the guided teacher's x0-prediction there, if it has been made
    x0: Tensor | None = None  #: (batch, ...) the real sample of it, and its noise
    noise: Tensor | None = None


def noised(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Points:
    """Real samples at t."""
    return Points(schedule.add_noise(x0, noise, t), t, condition, x0=x0, noise=noise)


@torch.no_grad()
def travelled(
    teacher: Denoiser, settings: Trajectories, noise: Tensor, condition: Condition, on_grid: Callable[[Tensor], Tensor] = lambda t: t
) -> Points:
    """Points of the teacher's ODE trajectories, one per part of [0, 1] (or a random choice of them), each with what it said there.

    Args:
        noise: (batch, ...), unit variance.
        on_grid: moves the times that are drawn to those that are wanted.
    """
    schedule, n = teacher.schedule, settings.steps
    x = noise * schedule.initial_scale
    u = torch.rand(n, len(x), dtype=torch.float64, device=x.device)
    drawn = (torch.arange(n, 0, -1, dtype=torch.float64, device=x.device)[:, None] - 1 + u) / n
    shifted = settings.shift * drawn / (1 + (settings.shift - 1) * drawn)
    times = on_grid(shifted.clamp_min(schedule.t_min))
    now = torch.ones_like(times[0])
    said = teacher(x, now, condition)
    states, answers = [], []
    for t in times:
        x = schedule.ddim(x, said, now, t)
        said, now = teacher(x, t, condition), t
        states.append(x)
        answers.append(said)
    count = n if settings.points is None else min(settings.points, n)
    chosen = torch.rand(len(x), n, device=x.device).argsort(1)[:, :count].T if count < n else torch.arange(n, device=x.device)[:, None].expand(n, len(x))

    def of(parts: Tensor) -> Tensor:
        """(n, batch, ...) → (count · batch, ...): the first point of all samples, the second of all, …"""
        index = chosen.reshape(chosen.shape + (1,) * (parts.dim() - 2)).expand(-1, -1, *parts.shape[2:])
        return parts.gather(0, index).flatten(0, 1)

    told = condition if count == 1 else condition[torch.arange(len(x)).repeat(count)]
    return Points(of(torch.stack(states)), of(times), told, of(torch.stack(answers)))
