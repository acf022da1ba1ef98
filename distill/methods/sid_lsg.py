"""SiD-LSG: score identity distillation of a guided teacher, the critic guided too, also while it learns.

    Zhou et al. 2024, arXiv 2406.01561 (long and short guidance)

    student   (D_T^w − D_F^w)·(D_F^w − x)(x_t, t, c)                       (SiD with a = 1)
    critic    ‖D_F^w(x_t, t, c) − x‖²,     D^w = D_u + w (D_c − D_u),      one w everywhere

Because the critic is guided in its own loss, the *guided* critic is what learns the student's denoiser: its conditional part alone
means nothing. So the fixed point is the guided teacher's law, as where the teacher alone is guided and the critic is plain (DMD),
and not the unguided one of VSD, whose critic learns unguided. No sample loses its condition for that (``critic_null: 0``).
"""

from __future__ import annotations

from typing import Literal

from distill.matching.objectives import Objective
from distill.matching.times import TimeLaw
from distill.methods.distribution import DistributionMatching, Scale


class SiDLSG(DistributionMatching):
    """Score identity distillation with long and short guidance."""

    name: Literal["sid_lsg"] = "sid_lsg"  # type: ignore[assignment]
    objective: Objective = "sid"
    alpha: float | tuple[float, float] = 1.0
    score_times: TimeLaw = (0.02, 0.98)
    guidance_scale: Scale | tuple[Scale, Scale] = 2.0
    critic_guidance_scale: Scale | Literal["same"] = "same"
    critic_training_guidance: Scale | Literal["same"] = "same"
