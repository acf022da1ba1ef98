"""LADD, latent adversarial diffusion distillation: heads on the frozen teacher's features of noised samples.

    Sauer et al. 2024, arXiv 2403.12015        SANA-Sprint  Chen et al. 2025, arXiv 2503.09641

    student        −l(x_t)
    discriminator  relu(1 + l(x_t)) + relu(1 − l(x_t, real)),        x_t noised to t ~ logit-normal(1, 1)

The teacher is both the judge's eye and, with ``real: teacher``, the source of what is real: latents that its own sampler made with
the guidance wanted, so that no other loss is needed. The noise level says what is judged: near 0 texture, near 1 the composition.
With ``rollout: data`` the student starts from real samples noised to a time of its ladder, mostly the first (``step_odds``).
SANA-Sprint's mismatched pairs: ``gan.mismatched``.
"""

from __future__ import annotations

from typing import Literal

from distill.matching.adversary import GAN
from distill.matching.objectives import Objective
from distill.matching.rollout import Rollout
from distill.matching.times import Times
from distill.methods.distribution import DistributionMatching


class LADD(DistributionMatching):
    """Adversarial only, on the frozen teacher's features."""

    name: Literal["ladd"] = "ladd"  # type: ignore[assignment]
    objective: Objective = "none"
    rollout: Rollout = "data"
    critic_steps: int = 1  # type: ignore[assignment]
    gan: GAN | None = GAN(weight=1.0, features="teacher", loss="hinge", times=Times(law="logit_normal", mean=1.0, std=1.0))
