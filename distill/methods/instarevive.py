"""InstaRevive: distribution matching whose range of noise follows how far each sample is from its goal.

    Zhu et al. 2025, "InstaRevive: One-Step Image Enhancement via Dynamic Score Matching", ICLR, arXiv 2504.15513

    g = w(t) (D_F − D_T)(x_t),        t ~ U[t_lo, t_max(x)],        t_max = t_lo + (t_hi − t_lo) min(d(x) / d_ref, 1)

A sample that is already near its goal, as in restoration, is best told what is wrong with it at low noise: from high noise the score
difference tells where its whole population should go. The goal is what the teacher makes of the sample, or, with
``score_times: {scope: {against: data}}``, the real sample of its condition. The critic learns the whole range. (The paper's loss
is not public; the form is reconstructed from its text.)
"""

from __future__ import annotations

from typing import Literal

from distill.matching.times import Scope, TimeLaw, Times
from distill.methods.distribution import DistributionMatching


class InstaRevive(DistributionMatching):
    """Dynamic score matching."""

    name: Literal["instarevive"] = "instarevive"  # type: ignore[assignment]
    score_times: TimeLaw = Times(low=0.02, high=0.98, scope=Scope())
