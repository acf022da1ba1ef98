"""Distillation-DPO: distil, and prefer what a metric without a gradient prefers.

    Zhao et al. 2025, "Diffusion Distillation With Direct Preference Optimization For Efficient 3D LiDAR Scene Completion", arXiv 2504.11447

Two samples of each condition are ranked by the metric. Two critics learn the student's law q and that of the winners, q_w. A sample
x wins with probability P(x) = q_w(x) / 2q(x), whose gradient is a difference of scores:

    min  KL(q ‖ p) − beta E_q[log P(x_t)]:        g(x_t) = s_q − s_T − beta (s_w − s_q)

The teacher bounds it: in one dimension, with p = N(0, 1) and a metric that likes larger x, the student's mean comes to rest at a place
that is known in closed form.

The paper's own gradient is another: critics of winners and of losers, (s_w − s_T) for winners and −(s_l − s_T) for losers. In the same
example it takes the mean the other way: winners are pulled back to the teacher, and losers pushed on. (Its public code multiplies these by
x_t − x, in which the student cancels: no gradient at all.) ``distill verify distillation_dpo`` shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from distill.denoiser import cat
from distill.errors import UserError
from distill.imports import import_object
from distill.matching.critic import Adaptive, denoising_loss
from distill.matching.objectives import injected
from distill.matching.rollout import ODE, Sample
from distill.matching.times import draw_times
from distill.methods.base import Batch, Update
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles


class DistillationDPO(DistributionMatching):
    """Distribution matching with a preference by a metric that need not be differentiable."""

    name: Literal["distillation_dpo"] = "distillation_dpo"  # type: ignore[assignment]
    like_teacher: ClassVar[Sequence[str]] = ("critic", "winner")

    #: module:function, (images, inputs) → (batch,) scores, the larger the better: images (batch, channels, height, width) in [0, 1].
    #: null: ranked at random, which prefers nothing
    metric: str | None = None
    beta: Annotated[float, Field(ge=0)] = 0.5  #: how strong the preference is beside the teacher
    second_noise: Annotated[float, Field(gt=0)] = 1.0  #: standard deviation of the second sample's noise (the paper's code: 1.1)

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            import_object(value)
        return value

    @model_validator(mode="after")
    def _two_critics(self) -> DistillationDPO:
        if self.objective != "kl" or self.divergence != "reverse_kl" or self.rollout in ODE:
            raise ValueError("a preference is a difference of scores on clean samples: objective kl, divergence reverse_kl, a rollout to clean samples")
        if self.critic_guidance_scale != 1.0 or self.critic_training_guidance != 1.0:
            raise ValueError("the two critics are compared with each other, unguided: leave out the critic's guidance")
        if isinstance(self.critic_steps, Adaptive):
            raise ValueError("the lag of two critics is not measured: give critic_steps as a number")
        return self

    @property
    def roles(self) -> Sequence[str]:  # type: ignore[override]
        return ("student", "critic", "winner")

    def needs_decoder(self) -> bool:
        return self.metric is not None or super().needs_decoder()

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        yield from super().step(roles, self._pairs(batch))

    def _pairs(self, batch: Batch) -> Batch:
        """Two samples of each condition: (2 batch, ...)."""
        noise = torch.cat([batch.noise, self.second_noise * torch.randn_like(batch.noise)])
        x0, group = (None if v is None else torch.cat([v, v]) for v in (batch.x0, batch.group))
        return replace(batch, noise=noise, condition=cat([batch.condition] * 2), x0=x0, group=group, inputs=list(batch.inputs) * 2)

    def _sample(self, roles: Roles, batch: Batch, fresh: bool = False) -> Sample:
        if fresh:
            noise = torch.randn_like(batch.noise)
            noise[len(noise) // 2 :] *= self.second_noise
            batch = replace(batch, noise=noise)
        return super()._sample(roles, batch)

    @torch.no_grad()
    def _wins(self, roles: Roles, batch: Batch, x0: Tensor) -> Tensor:
        """(2 batch,) whether a sample is the better one of its pair; ties are tossed up."""
        n = len(x0) // 2
        coin = torch.rand(n, device=x0.device) < 0.5
        if self.metric is None:
            return torch.cat([coin, ~coin])
        assert roles.decode is not None
        metric: Callable[..., Tensor] = import_object(self.metric)
        scores = torch.as_tensor(metric(roles.decode(x0), batch.inputs), device=x0.device)
        if scores.shape != (2 * n,):
            raise UserError(f"method.metric: {self.metric} gave {tuple(scores.shape)} for {2 * n} images: one score for each is wanted")
        first, second = scores.chunk(2)
        wins = torch.where(first == second, coin, first > second)
        return torch.cat([wins, ~wins])

    def _score_loss(self, roles: Roles, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor | float]]:
        x = sample.x
        with torch.no_grad():
            t = self._draw(self.score_times, roles, batch, sample)
            x_t = roles.schedule.add_noise(x, torch.randn_like(x), t)
            assert roles.winner is not None
            teacher, own = self._predictions(roles, x_t, t, batch)
            winner = roles.winner.predict(x_t, t, batch.condition.without_guidance())
            weight = self._weight(roles, x, t, None, teacher, own)
            gap, odds = weight * (own.x0 - teacher.x0), weight * (winner.x0 - own.x0)
        return injected(x, gap - self.beta * odds), {"score_gap": gap.abs().mean(), "odds_gap": odds.abs().mean()}

    def _critic_update(self, roles: Roles, batch: Batch, sample: Sample) -> Iterator[Update]:
        yield from super()._critic_update(roles, batch, sample)
        assert roles.winner is not None
        rows = self._wins(roles, batch, sample.x).nonzero()[:, 0]
        winners = sample.x[rows]
        t = draw_times(self.critic_times, winners, roles.schedule, batch.progress)
        yield "winner", denoising_loss(roles.winner, winners, t, batch.condition[rows]), {}
