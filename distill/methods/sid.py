"""SiD, score identity distillation: the Fisher divergence of the noised laws, data-free.

    Zhou et al. 2024, arXiv 2404.04057

    L = E w(t) (D_T − D_F)·[(D_T − x) − a (D_T − D_F)](x_t),        x_t = alpha x + sigma noise,

differentiated through x and through x_t in both networks. By the score identities, a = ½ gives half of the Fisher divergence's gradient
and a = 1 that of SIM with the squared norm, the sampling law held still.

The paper trains with a = 1.2, its authors' later text-to-image work with a = 1, which is the default here. Above 1 the loss has a place
of no return: where the student's noised variance exceeds a/(a − 1) times the teacher's (6 times, for 1.2) its gradient drives it further
outwards, with a perfect critic too (``distill verify sid`` has the closed form). A student that starts at the teacher never sees the
place; one that starts anywhere and overtakes its critic does. On a Gaussian from random networks (Adam 2e-3, one or two critic updates)
a = 1.2 diverged in 6 runs of 6, a = 1 in 1 of 5, a = ½ in none of 5; with five updates all three converged, in 3 runs of 3 each.

Critic updates: five. The student descends through the critic's inputs, and so also along the critic's errors, which plain score differences
(DMD) do not: at a = 1 with two updates 4 of 10 seeds diverged at Adam 4e-3 (none at 1e-3 and 2e-3), DMD with two updates on none of
those four, and SiD with five on none of the three of them that were tried.
``alpha: [1.0, 0.5]`` moves a over training, to end at the exact Fisher divergence.
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
