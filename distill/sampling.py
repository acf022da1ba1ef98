"""Few-step sampling with the settings that a student was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.errors import UserError
from distill.schedule import NoiseSchedule


@dataclass(frozen=True)
class Sampler:
    """How a student turns noise into x0; stored beside its weights, so that nobody has to know any timesteps.

    Args:
        times: the trained ladder, descending in t; noise enters at the first one.
        steps: the default number of network calls.
        guidance_scale: the teacher's guidance that is folded into the weights (1: none). Sample without guidance.
        guidance_range: where the student has a guidance embedding, the scales it was trained for.
        gamma: the share of the noise that is drawn anew at each step (Kim et al. 2024, CTM, alg. 3; TCD's eta). 1: all of it,
            as consistency models and DMD2 do; 0: none, the deterministic DDIM/Euler step of the ODE.
    """

    times: tuple[float, ...] = (1.0,)
    steps: int = 1
    guidance_scale: float = 1.0
    guidance_range: tuple[float, float] | None = None
    gamma: float = 1.0
    end_time: bool = False  #: whether the student is told where each of its jumps ends: at the way point, the last one at clean data

    def ladder(self, steps: int | None = None) -> tuple[float, ...]:
        """The times of an n-step sample: n of the trained ones, evenly spaced from the top.

        This is the rule of diffusers' ``LCMScheduler`` (``original_inference_steps`` = the ladder's length), so that
        an exported student visits the same ones.
        """
        n = self.steps if steps is None else steps
        if not 1 <= n <= len(self.times):
            raise UserError(f"this student samples in 1 to {len(self.times)} steps, not {n}")
        return tuple(self.times[i * len(self.times) // n] for i in range(n))

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Sampler:
        """The inverse of ``dataclasses.asdict``, after a trip through JSON.

        Raises:
            TypeError: if the facts are not a sampler's.
        """
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        return cls(**settings)


def uniform_ladder(steps: int, train_steps: int = 1000) -> tuple[float, ...]:
    """n times at even whole distances of the teacher's own steps, from the top: for n = 4 the timesteps 999, 749, 499, 249.

    These are the timesteps of diffusers' ``LCMScheduler`` with ``original_inference_steps`` = n, to the letter: where n does
    not divide the training steps, the first one lies a little below the top, as it does there.
    """
    stride = train_steps // steps
    return tuple((steps - i) * stride / train_steps for i in range(steps))


def way_point(schedule: NoiseSchedule, time: float, gamma: float) -> float:
    """The time s ≤ ``time`` that a step to ``time`` goes down to without noise, before fresh noise takes it back up.

    0 (clean data) for gamma = 1, ``time`` itself for gamma = 0; between them (1 − gamma) of the model's time, rounded
    down to a whole one as diffusers' ``TCDScheduler`` does.
    """
    if gamma in (0.0, 1.0):
        return 0.0 if gamma else time
    below = torch.floor((1 - gamma) * schedule.model_time(torch.tensor(time, dtype=torch.float64)))
    return float(schedule.from_model_time(below)) if below >= 1 else 0.0


def renoise_sample(
    student: Denoiser, times: Sequence[float], noise: Tensor, condition: Condition | None,
    generator: torch.Generator | None = None, gamma: float = 1.0, end_time: bool = False,
) -> Tensor:
    """x0 by alternating one network call with fresh noise at the next time (Song et al. 2023, alg. 1; DMD2; LCM).

        x0 = D(x_t, t);   x_u = alpha_u x0 + sigma_u fresh noise

    With gamma < 1 (CTM, TCD) part of the noise is the network's own: a DDIM step from x_t to the way point s ≤ u, then
    noise from s up to u. With gamma = 0 it is the DDIM step from t to u alone, and no noise is drawn.

    Args:
        noise: unit-variance noise (batch, ...), the state at the first time but for the schedule's scale.
        end_time: tell the student the s of each step.
    """
    from diffusers.utils.torch_utils import randn_tensor

    schedule = student.schedule

    def at(time: float) -> Tensor:
        return torch.full((len(noise),), time, dtype=torch.float64, device=noise.device)

    ways = [*(way_point(schedule, time, gamma) for time in times[1:]), 0.0]

    def told(s: float) -> Condition | None:
        return (condition or Condition()).ending(at(s)) if end_time else condition

    state = noise * schedule.initial_scale
    x0 = student(state, at(times[0]), told(ways[0]))
    for (now, time), s, after in zip(pairwise(times), ways, ways[1:], strict=False):
        state = schedule.ddim(state.to(x0.dtype), x0, at(now), at(s)) if s > 0 else x0
        if gamma > 0:
            fresh = randn_tensor(x0.shape, generator, x0.device, x0.dtype)
            state = schedule.renoise(state, fresh, at(s), at(time)) if s > 0 else schedule.add_noise(x0, fresh, at(time))
        x0 = student(state, at(time), told(after))
    return x0
