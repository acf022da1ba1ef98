"""SiD, score identity distillation: the Fisher divergence of the noised laws, data-free.

    Zhou et al. 2024, arXiv 2404.04057        SiD-LSG  Zhou et al. 2024, arXiv 2406.01561

    L = E w(t) (D_T − D_F)·[(D_T − x) − a (D_T − D_F)](x_t),        x_t = alpha x + sigma noise,

differentiated through x and through x_t in both networks. By the score identities, a = ½ gives half of the Fisher divergence's gradient
and a = 1 that of SIM with the squared norm; the paper's 1.2 subtracts |D_T − D_F|² beyond that (and trains best there).
With text, guidance goes on both networks, in the critic's training too (long and short guidance):

    {guidance_scale: 2, critic_guidance_scale: same, critic_training_guidance: 2, critic_null: 0.1, alpha: 1}
"""

from __future__ import annotations

from typing import Literal

from distill.matching.objectives import Objective
from distill.matching.times import TimeLaw
from distill.methods.distribution import DistributionMatching


class SiD(DistributionMatching):
    """Score identity distillation."""

    name: Literal["sid"] = "sid"  # type: ignore[assignment]
    objective: Objective = "sid"
    score_times: TimeLaw = (0.02, 0.8)
    critic_steps: int = 1  # type: ignore[assignment]
