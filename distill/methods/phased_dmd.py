"""Phased DMD: the noise levels are split into phases, and each phase's own network is matched at the level where it ends.

    Fan et al. 2025, "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals", arXiv 2510.27684

Backward simulation judges clean samples alone, also those of the first step: a one-step objective hides in it, and variety is lost.
Here the student's ladder falls into phases 1 = t_0 > t_1 > … > t_K = 0. Expert k takes x from t_{k−1} to t_k by deterministic steps,
after the experts before it (without gradient), and x at s = t_k is judged as it is, at the levels above it:

    t ~ score_times within (s + margin, 1),   x_t = a x_s + b noise,  a = alpha_t/alpha_s,  b² = sigma_t² − a² sigma_s²
    student    g = (D_F − D_T)(x_t) / mean|x0 − D_T|  into x_s,        x0 the clean estimate that x_s was made with
    critic     the denoiser of x_s's law, though no clean sample exists: D_F(x_t) → x_s/alpha_s − alpha_t sigma_s²/(alpha_s² b) noise
               (guide, 0.7; squared error weighted by min(1, 10 b²))

The phases are trained one after another. With each the critic begins anew from the teacher, and its optimizer with it: what it had
learnt is another law's. In a phase of several steps a drawn one of them goes all of the way to t_k, with gradient, after the ones
before it. In the last phase s = 0, and all of this is DMD.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.experts import ByTime, Partition
from distill.matching.critic import Adaptive
from distill.matching.rollout import Rollout, Sample, roll_out
from distill.matching.times import TimeLaw
from distill.methods.base import Batch, Update
from distill.methods.distribution import DistributionMatching, Scale
from distill.roles import Roles
from distill.sampling import Sampler


class PhasedDMD(DistributionMatching):
    """Phased distribution matching: one network for each part of the noise levels, trained one after another."""

    name: Literal["phased_dmd"] = "phased_dmd"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 2
    rollout: Rollout = "phase"

    phases: Annotated[int, Field(ge=1)] = 2  #: the ladder's steps fall to them as equally as can be
    shares: list[Annotated[float, Field(gt=0)]] | None = None  #: of the training, one per phase, relative to each other; equal if not given
    phase_guidance: list[Scale] | None = None  #: guidance_scale of each phase; the first one's decides the layout
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02  #: t is drawn above s + margin: nearer to s the critic's target is all noise

    @model_validator(mode="after")
    def _in_phases(self) -> PhasedDMD:
        if self.rollout != "phase" or self.objective != "kl":
            raise ValueError("what is judged lies at a noise level, where a phase ends: leave out rollout and objective")
        if self.gan is not None or self.terms:
            raise ValueError("gan and terms judge clean samples, and a phase ends at a noise level: leave them out, or use dmd2")
        if isinstance(self.critic_steps, Adaptive):
            raise ValueError("the critic's lag is measured on clean samples: give critic_steps as a number")
        if self.phases > self.steps:
            raise ValueError(f"{self.phases} phases share {self.steps} steps: set steps to {self.phases} or more")
        for name in ("shares", "phase_guidance"):
            given = getattr(self, name)
            if given is not None and len(given) != self.phases:
                raise ValueError(f"{name} must be {self.phases} numbers, one per phase")
        highest = min(_highest(law) for law in (self.score_times, self.critic_times))
        if max(self._ends) + self.margin >= highest:
            raise ValueError(f"a phase ends at t = {max(self._ends):g}, and t is drawn up to {highest:g}: no room is left above s + margin")
        return self

    # -- the phases -----------------------------------------------------------------------------------------------------

    def _steps_of(self, phase: int) -> tuple[int, int]:
        """(first step of a phase, first step of the next one)."""
        return phase * self.steps // self.phases, (phase + 1) * self.steps // self.phases

    @property
    def _ends(self) -> list[float]:
        """t_1 … t_K."""
        return [*(self._ladder[self._steps_of(k)[1]] for k in range(self.phases - 1)), 0.0]

    def phase(self, progress: float) -> int:
        """Which one is trained, from 0."""
        return sum(progress >= end - 1e-9 for end in self._parts[:-1])

    def stretch(self, progress: float) -> tuple[float, float]:
        k, parts = self.phase(progress), [0.0, *self._parts]
        return parts[k], parts[k + 1]

    @property
    def _parts(self) -> list[float]:
        """How far training is at the end of each phase."""
        shares = self.shares or [1.0] * self.phases
        return [end / sum(shares) for end in accumulate(shares)]

    def experts(self) -> ByTime | Partition | None:
        return ByTime(tuple(self._ladder[self._steps_of(k)[0]] for k in range(self.phases))) if self.phases > 1 else None

    def sampler(self) -> Sampler:
        plain, guidance = super().sampler(), self.phase_guidance
        return plain if guidance is None else replace(plain, guidance_scale=sum(guidance) / len(guidance))

    # -- training -------------------------------------------------------------------------------------------------------

    def initial_state(self) -> dict[str, Tensor]:
        return super().initial_state() | {"phase": torch.zeros(())}

    def state_of(self, roles: Roles) -> dict[str, Tensor]:
        """The critic's first weights, where the teacher does not hold the same ones (an adapter's; a quantised teacher)."""
        held = roles.named_parameters("teacher")
        return {_kept(n): p.detach().clone() for n, p in roles.named_parameters("critic").items() if n not in held or not _same(held[n], p)}

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        phase = self.phase(batch.progress)
        begun = roles.state["phase"]
        if not begun.is_meta and float(begun) < phase:  # a plan knows no values
            self._begin_critic(roles)
            begun.fill_(phase)
        told = self if self.phase_guidance is None else self.model_copy(update={"guidance_scale": self.phase_guidance[phase]})
        yield from super(PhasedDMD, told).step(roles, batch)

    @torch.no_grad()
    def _begin_critic(self, roles: Roles) -> None:
        """The critic as it was at first."""
        held = roles.named_parameters("teacher")
        for name, weight in roles.named_parameters("critic").items():
            weight.copy_(roles.state[_kept(name)] if _kept(name) in roles.state else held[name])
        if roles.forget is not None:
            roles.forget("critic")

    def _sample(self, roles: Roles, batch: Batch, fresh: bool = False) -> Sample:
        noise = torch.randn_like(batch.noise) if fresh else batch.noise
        within = self._steps_of(self.phase(batch.progress))
        return roll_out(
            roles.student, self.rollout, self._ladder, noise, batch.condition, gradient_steps=self.gradient_steps, odds=self.step_odds, within=within
        )

    def _draw(self, law: TimeLaw, roles: Roles, batch: Batch, sample: Sample) -> Tensor:
        return super()._draw(law, roles, batch, sample if sample.s is None else replace(sample, s=sample.s + self.margin))


def _highest(law: TimeLaw) -> float:
    """The upper bound of t."""
    return law[1] if isinstance(law, tuple) else min(law.high, (law.end or (0.0, 1.0))[1])


def _kept(weight: str) -> str:
    return f"critic/{weight}"


def _same(held: Tensor, weight: Tensor) -> bool:
    """Whether the teacher's tensor holds what the critic's weight is at first."""
    plain = held.shape == weight.shape and held.dtype.is_floating_point and type(held.data) is Tensor
    return plain and (weight.is_meta or torch.equal(held.to(weight), weight))
