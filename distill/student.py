"""The result of a distillation: weights (a full backbone or an adapter) and the sampler that they were trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.adapters import Adapters
from distill.denoiser import BackboneDenoiser, Condition
from distill.errors import UserError
from distill.experts import Routed, networks_of
from distill.sampling import Sampler, renoise_sample
from distill.teacher import Teacher


@dataclass
class Student:
    """A student beside the teacher whose pipeline (encoders, decoder, scheduler's schedule) it shares.

    Args:
        denoiser: its backbone, or several; for a LoRA student the shared backbone with the adapter named "student" in use.
        adapters: the adapters of a LoRA student, None for full weights.
    """

    teacher: Teacher
    denoiser: BackboneDenoiser | Routed
    sampler: Sampler
    adapters: Adapters | None = None

    @property
    def networks(self) -> list[BackboneDenoiser]:
        """Those that it is made of."""
        return networks_of(self.denoiser)

    @property
    def network(self) -> BackboneDenoiser:
        """The one that it is made of.

        Raises:
            UserError: if there are several.
        """
        if len(self.networks) > 1:
            raise UserError(f"a student of {len(self.networks)} networks is no single LoRA: use --to few-step")
        return self.networks[0]

    @torch.no_grad()
    def sample(
        self, inputs: Sequence[Any], steps: int | None = None, generator: torch.Generator | None = None,
        noise: Tensor | None = None, guidance_scale: float | None = None,
    ) -> Tensor:
        """x0 for prompts or class labels, (len(inputs), ...), before decoding.

        Args:
            generator: draws the initial noise first (unless given), then each re-noising, as diffusers' pipelines do.
            guidance_scale: for a student with a guidance embedding; the middle of its trained range if not given.
        """
        noise = self.teacher.noise(len(inputs), generator) if noise is None else noise
        return self.sample_from(self.teacher.condition(inputs), noise, steps, generator, guidance_scale)

    @torch.no_grad()
    def sample_from(
        self, condition: Condition, noise: Tensor, steps: int | None = None, generator: torch.Generator | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """The same for encoded conditions and given noise."""
        if self.sampler.guidance_range is not None:
            scale = sum(self.sampler.guidance_range) / 2 if guidance_scale is None else guidance_scale
            condition = condition.with_guidance(torch.full((len(noise),), scale, device=noise.device))
        return renoise_sample(self.denoiser, self.sampler.ladder(steps), noise, condition, generator, self.sampler.gamma, self.sampler.end_time)

    def images(self, inputs: Sequence[Any], **settings: Any) -> Tensor:
        """Decoded samples, (len(inputs), channels, height, width) in [0, 1]; settings as for ``sample``."""
        return self.teacher.decode(self.sample(inputs, **settings))
