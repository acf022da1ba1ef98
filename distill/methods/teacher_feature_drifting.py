"""Teacher-Feature Drifting: samples drift in the frozen teacher's hidden features; no critic and no adversary.

    Zhang, Li et al. 2026, arXiv 2605.07327        drifting models  Deng et al. 2026, arXiv 2602.04770

    L = Σ_layers ‖ f − sg[ f + Σ_r F_r(f) ] ‖²  +  coverage,        f = teacher features of x + small noise,

F_r the pull of real features less that of the student's own, by a softmax over distances (losses/drifting.py): for a Gaussian kernel
the score difference of two kernel density estimates. It is zero where the laws agree. The field lives in a batch: give each
condition several samples (``trainer.batch_size`` well above the number of classes), or set ``by_condition: false``.
"""

from __future__ import annotations

from typing import Literal

from distill.matching.objectives import Objective
from distill.matching.terms import AnyTerm, Drifting
from distill.methods.distribution import DistributionMatching


class TeacherFeatureDrifting(DistributionMatching):
    """Drifting in the teacher's features, with mode coverage."""

    name: Literal["teacher_feature_drifting"] = "teacher_feature_drifting"  # type: ignore[assignment]
    objective: Objective = "none"
    terms: list[AnyTerm] = [Drifting()]
