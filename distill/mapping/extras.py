"""What goes with the consistency loss: an adversary, auxiliary terms, and a difference of scores.

    adversary   judges the student's jump to the end e, noised from there, against the target's jump (Wang et al. 2024, PCM), real samples
                (SANA-Sprint, SCott), in any of ``matching/adversary.py``'s ways
    proxy       a reward's stand-in (``proxy.py``)
    terms       rewards and the like, of its x0-predictions (``matching/terms.py``)
    matching    the distribution-matching engine's own step on the student's own samples, critic and all (Hyper-SD's last stage, rCM)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.denoiser import Condition
from distill.matching.adversary import GAN, discriminator_loss, student_loss
from distill.matching.rollout import Sample
from distill.matching.terms import Context
from distill.methods.base import Batch, Update
from distill.roles import Roles

if TYPE_CHECKING:
    from distill.methods.consistency import Consistency


@dataclass(frozen=True)
class Made:
    """What the student made of a batch's points."""

    x: Tensor  #: (batch, ...) its jump to the end, with gradient
    x0: Tensor  #: (batch, ...) its x0-prediction, with gradient
    condition: Condition
    end: Tensor | None = None  #: (batch,) t of x; None: clean
    target: Tensor | None = None  #: what the jump is to be
    real: Tensor | None = None  #: (batch, ...) real samples, one for each

    def detached(self) -> Made:
        return replace(self, x=self.x.detach(), x0=self.x0.detach())


def extra_loss(method: Consistency, roles: Roles, batch: Batch, made: Made) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Everything in the student's loss beside consistency."""
    loss = made.x.new_zeros(())
    logs: dict[str, Tensor | float] = {}
    if method.gan is not None:
        judged = _at_largest(method, roles, batch, made)
        real, below = _real(method.gan, roles, judged), _below(method, judged, batch)
        value = student_loss(method.gan, roles, judged.x, judged.condition, real, batch.progress, judged.end, below)
        loss, logs["gan"] = loss + method.gan.weight * value, value.detach()
    if method.proxy is not None:
        reward = method.proxy.score(roles, made.x0, made.condition).mean()
        loss, logs["proxy"] = loss - method.proxy.weight * reward, reward.detach()
    for term in method.terms:
        told = replace(batch, condition=made.condition, x0=made.real)
        weighted, logs[term.kind] = term.weighted(Context(roles, told, Sample(made.x0, made.x0), method.ladder[0]))
        loss = loss + weighted
    if (matching := method.score_matching(batch.progress)) is not None:
        value, others = matching._student_loss(roles, batch, matching._sample(roles, batch))
        loss = loss + method.matching_weight * value
        logs |= others
    return loss, logs


def followers(method: Consistency, roles: Roles, batch: Batch, made: Made) -> Iterator[Update]:
    """The updates of the discriminator and the critic, after the student's."""
    if method.gan is not None:
        with torch.no_grad():
            judged = _at_largest(method, roles, batch, made)
        real = _real(method.gan, roles, judged)
        assert real is not None
        loss, accuracy = discriminator_loss(
            method.gan, roles, judged.x.detach(), judged.condition, real, batch.progress, judged.end, _below(method, judged, batch)
        )
        yield "discriminator", loss, {"accuracy": accuracy}
    if method.proxy is not None:
        samples = [x for x in (made.x0, made.target, made.real) if x is not None]
        yield "discriminator", method.proxy.loss(roles, samples, made.condition, batch.inputs), {}
    if (matching := method.score_matching(batch.progress)) is not None:
        for _ in range(matching._critic_updates(roles)):
            with torch.no_grad():
                sample = matching._sample(roles, batch, fresh=True)
            yield from matching._critic_update(roles, batch, sample)


def _at_largest(method: Consistency, roles: Roles, batch: Batch, made: Made) -> Made:
    """What is judged: for so large a share of the samples what the student makes of pure noise (SANA-Sprint: a one-step sample is
    what its discriminator has to see most)."""
    count = round(method.gan_at_start * len(made.x))
    if not count:
        return made
    noise = torch.randn_like(made.x[:count]) * roles.schedule.initial_scale
    start = torch.ones(count, dtype=torch.float64, device=noise.device)
    own = roles.student(noise.to(batch.noise), start, made.condition[:count])
    return replace(made, x=torch.cat([own.to(made.x), made.x[count:]]))


def _real(gan: GAN, roles: Roles, made: Made) -> Tensor | None:
    """What counts as real, at the same noise level as the student's jump."""
    if gan.real == "target":
        return made.target
    if made.end is None or made.real is None:
        return made.real
    return roles.schedule.add_noise(made.real, torch.randn_like(made.real), made.end)


def _below(method: Consistency, made: Made, batch: Batch) -> Tensor | None:
    """The upper end of the segment that starts at the jump's end: there both are compared."""
    return None if made.end is None else made.end + 1 / method.segment_count(batch.progress)
