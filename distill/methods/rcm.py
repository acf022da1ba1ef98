"""rCM, score-regularised consistency: sCM covers every mode, a difference of scores sharpens the student's own samples.

    Zheng et al. 2025, arXiv 2510.08431 (ICLR 2026)

    L = L_sCM(noised data) + λ L_DMD(own samples),     own samples: 1 to N steps with fresh noise between them, gradient through the last

The forward divergence of sCM is off the student's path and forgets no mode; DMD's reverse one is on it and prefers the largest. One
student update for four of the critic's; DMD sets in after the warm-up. The paper's 100 : 1 is of its own reductions; here both losses are means.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.mapping.tangent import Tangent
from distill.matching.times import TimeLaw, Times
from distill.methods.consistency import Consistency
from distill.methods.distribution import DistributionMatching


class RCM(Consistency):
    """Continuous-time consistency with a DMD regulariser."""

    name: Literal["rcm"] = "rcm"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 4
    tangent: Tangent | None = Tangent()
    train_times: TimeLaw = Times(law="log_sigma", mean=0.7, std=1.6)
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
    matching: DistributionMatching | None = DistributionMatching(critic_steps=4)
    matching_weight: Annotated[float, Field(gt=0)] = 0.1
    matching_from: Annotated[float, Field(ge=0, lt=1)] = 0.1
