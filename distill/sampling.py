"""Few-step sampling with the settings that a student was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """How a student turns noise into x0; stored beside its weights, so that nobody has to know any timesteps.

    Args:
        times: the trained ladder, descending in t; noise enters at the first one.
        steps: the default number of network calls.
        guidance_scale: the teacher's guidance that is folded into the weights (1: none). Sample without guidance.
        guidance_range: where the student has a guidance embedding, the scales it was trained for.
    """

    times: tuple[float, ...] = (1.0,)
    steps: int = 1
    guidance_scale: float = 1.0
    guidance_range: tuple[float, float] | None = None

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


def renoise_sample(
    student: Denoiser, times: Sequence[float], noise: Tensor, condition: Condition | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x0 by alternating one network call with fresh noise at the next time (Song et al. 2023, alg. 1; DMD2; LCM).

        x0 = D(x_t, t);   x_s = alpha_s x0 + sigma_s fresh noise

    Args:
        noise: unit-variance noise (batch, ...), the state at the first time but for the schedule's scale.
    """
    from diffusers.utils.torch_utils import randn_tensor

    def at(time: float) -> Tensor:
        return torch.full((len(noise),), time, dtype=torch.float64, device=noise.device)

    x0 = student(noise * student.schedule.initial_scale, at(times[0]), condition)
    for time in times[1:]:
        fresh = randn_tensor(x0.shape, generator, x0.device, x0.dtype)
        x0 = student(student.schedule.add_noise(x0, fresh, at(time)), at(time), condition)
    return x0
