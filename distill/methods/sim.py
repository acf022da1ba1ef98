"""SIM, score implicit matching: any distance between the scores of student and teacher, data-free.

    Luo et al. 2024, arXiv 2410.16794

    L = E w(t) d'(D_T − D_F)·(D_F − x)(x_t),        d(y) = sqrt(‖y‖² + c²) − c

differentiated through x and through x_t in both networks. It is the gradient of E d(D_T − D_F) with the law of x_t held fixed
(score projection identity). The pseudo-Huber distance makes d' a vector of length at most one: the loss needs no normaliser of
its own, which is why the weight is 1. c is in units of a root mean square over the sample's elements. Limits: c → ∞ is SiD's
a = 1 over c (``huber: null``: without the c); c → 0 leaves the direction of D_T − D_F alone.
"""

from __future__ import annotations

from typing import Literal

from distill.matching.objectives import Objective
from distill.matching.times import TimeLaw
from distill.methods.distribution import DistributionMatching, Weighting


class SIM(DistributionMatching):
    """Score implicit matching."""

    name: Literal["sim"] = "sim"  # type: ignore[assignment]
    objective: Objective = "sim"
    weighting: Weighting = "none"
    score_times: TimeLaw = (0.02, 0.8)
