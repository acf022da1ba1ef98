"""ASD, adversarial self-distillation: the student's n-step samples against its own of n + 1 steps.

    Yang et al. 2026 (ICLR), arXiv 2511.01419

    n ~ U{1 … N},   x = G^(n)(z),   L = L_KL(x) + w softplus(−l(x_t)),    real: G^(n+1)(z'), without gradient

The teacher is far from one step, the next longer sample of the student is near: each n learns from n + 1, and the longest from the
teacher's scores alone. One student serves every number of steps up to N. The noise of the two is independent: laws are compared,
not samples. A longer sample that is worse than the shorter one would be a bad example: keep the adversary's weight low at first.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.matching.adversary import GAN
from distill.matching.rollout import Rollout
from distill.methods.distribution import DistributionMatching


class ASD(DistributionMatching):
    """Reverse KL with an adversary between n and n + 1 steps."""

    name: Literal["asd"] = "asd"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 4
    rollout: Rollout = "any_steps"
    gan: GAN | None = GAN(weight=0.03, real="longer")
