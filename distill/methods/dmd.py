"""DMD, distribution matching distillation with regression: reverse KL, anchored by pairs of the teacher's own.

    Yin et al. 2024, arXiv 2311.18828

    g = (D_critic − D_teacher)(x_t) / mean|x − D_teacher|                      into x, as in DMD2,
    L = L_KL + 0.25 · d( G(z'), x' ),      x' the teacher's own sampler from the noise z', made before training.

The score difference alone lets a student drop modes; each pair says where its noise belongs. The paper's distance d is LPIPS between
decoded images (``metric: lpips``); the default needs no further network. One critic update per student update. The pairs are made
with the guidance that the score difference has, and with unit-variance noise, whatever the schedule.
"""

from __future__ import annotations

from typing import Literal

from distill.matching.terms import AnyTerm, Regression
from distill.methods.distribution import DistributionMatching


class DMD(DistributionMatching):
    """Distribution matching with regression onto the teacher's pairs (DMD)."""

    name: Literal["dmd"] = "dmd"  # type: ignore[assignment]
    critic_steps: int = 1  # type: ignore[assignment]
    terms: list[AnyTerm] = [Regression()]
