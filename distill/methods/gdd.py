"""GDD: a diffusion model is an innate one-step generator; an adversary alone brings it out.

    Zheng & Yang 2024, arXiv 2405.20750

    student        softplus(−l(x))
    discriminator  softplus(l(x)) + softplus(−l(x_real)) + ½ γ |∇ l(x_real)|²,        γ = 1e-4

No teacher is evaluated in training: the student starts from it, and most of its convolutions stay frozen (GDD-I), which the recipe
says: ``student.freeze: ["*.conv1", "*.conv2"]``. The paper's discriminator stands on networks pretrained on ImageNet
(``features: projected``), which also shape the metrics that it is judged by; the default's features are random. Samples are judged
as they are, without noise.
"""

from __future__ import annotations

from typing import Literal

from distill.matching.adversary import GAN
from distill.matching.objectives import Objective
from distill.methods.distribution import DistributionMatching


class GDD(DistributionMatching):
    """Adversarial only, on features of another network."""

    name: Literal["gdd"] = "gdd"  # type: ignore[assignment]
    objective: Objective = "none"
    critic_steps: int = 1  # type: ignore[assignment]
    gan: GAN | None = GAN(weight=1.0, features="random", times=(0.0, 0.0), r1=1e-4, r1_form="exact")
