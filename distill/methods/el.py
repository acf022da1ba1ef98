"""EL, the embedding loss: moments of random features, beside any distribution matching or alone.

    Ying et al. 2026, arXiv 2604.22379

    L = L_KL + w · E_φ ‖ mean φ(x) − mean φ(x_real) ‖²,        φ a random network, drawn anew at each step,

per condition where several samples of a batch share one, estimated without bias (samples are not compared with themselves). Networks
are not trained: the signal has neither an adversary's instability nor a regression's ceiling. As the main loss: {objective: none}.
In place of real data, the teacher's own samples: {real: teacher}. As an auxiliary of any method: a term of ``kind: embedding``.
"""

from __future__ import annotations

from typing import Literal

from distill.matching.terms import AnyTerm, Embedding
from distill.methods.distribution import DistributionMatching


class EL(DistributionMatching):
    """Reverse KL with the embedding loss."""

    name: Literal["el"] = "el"  # type: ignore[assignment]
    terms: list[AnyTerm] = [Embedding()]
