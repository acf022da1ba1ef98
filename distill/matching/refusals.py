"""What makes no sense: combinations of the engine's settings that would train nothing, or something else than they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from distill.matching.critic import Adaptive
from distill.matching.objectives import LIVE
from distill.matching.rollout import ODE
from distill.matching.times import scope_of

if TYPE_CHECKING:
    from distill.methods.distribution import DistributionMatching


def refusals(method: DistributionMatching) -> Iterator[str]:
    """One line for each: what is wrong and what to do."""
    if method.objective == "none" and method.gan is None and not method.terms:
        yield "objective none leaves nothing to train the student with: add a gan section or terms"
    if method.needs_ratio and method.gan is None:
        yield f"divergence {method.divergence} needs a density ratio: add a gan section, or use reverse_kl"
    if method.needs_ratio and method.gan is not None and method.gan.loss != "logistic":
        yield f"divergence {method.divergence} reads logits as a density ratio, which {method.gan.loss} logits are not: set gan.loss to logistic"
    if method.divergence != "reverse_kl" and method.objective in ("sid", "sim", "none"):
        yield f"objective {method.objective} has no choice of divergence: use kl or expanded"
    if method.times is not None and (len(method.times) != method.steps or sorted(method.times, reverse=True) != method.times):
        yield f"times must be {method.steps} descending numbers, one per step"
    if method.rollout in ODE and method.objective in LIVE:
        yield f"objective {method.objective} needs clean samples, and rollout {method.rollout} ends at a noise level: use kl"
    if method.rollout in ODE and method.gan is not None:
        yield f"gan compares clean samples with real ones, and rollout {method.rollout} ends at a noise level: use backward_simulation, or no gan"
    if method.own_ranges and method.rollout != "trajectory":
        yield "own_ranges are the steps' of rollout trajectory: set it, or leave own_ranges out"
    if method.step_odds is not None and (len(method.step_odds) != method.steps or not sum(method.step_odds)):
        yield f"step_odds must be {method.steps} numbers, one per step, and not all zero"
    if method.rollout == "any_steps" and method.steps == 1:
        yield "rollout any_steps chooses between numbers of steps: set steps to 2 or more"
    if method.gan is not None and method.gan.real == "longer" and method.rollout != "any_steps":
        yield "gan.real longer compares n steps with n + 1: set rollout to any_steps"
    if method.gan is not None and method.gan.real == "longer" and method.objective == "none" and not method.terms:
        yield "gan.real longer leaves the longest samples to the score difference: objective none trains them by nothing"
    if method.gan is not None and method.gan.real == "target":
        yield "gan.real target is of consistency methods: use data, or longer"
    if method.gan is not None and method.gan.features == "critic" and not method.has_critic:
        yield "gan.features critic: objective none trains no critic: use teacher or random"
    if method.critic_training_guidance == "same" and isinstance(method.guidance_scale, tuple):
        yield "critic_training_guidance same needs one guidance_scale, not a range"
    if isinstance(method.critic_steps, Adaptive) and not method.has_critic:
        yield "objective none trains no critic to adapt to: set critic_steps to a number, that of the discriminator's updates"
    if method.real == "teacher" and not method.looks_at_real:
        yield "real teacher, and nothing here looks at real samples: leave it out"
    if method.critic_guidance_scale != 1.0 and method.critic_training_guidance == 1.0 and not method.critic_null:
        yield "a guided critic must learn samples without their condition too: set critic_null to 0.1 or so"
    if method.critic_guidance_scale == "same" and method.guidance_scale == 1.0:
        yield "critic_guidance_scale same, and the teacher is not guided: set guidance_scale"
    if scope_of(method.critic_times) is not None or (method.gan is not None and scope_of(method.gan.times) is not None):
        yield "scope is for score_times: the critic and the discriminator must know every level that they are asked at"
