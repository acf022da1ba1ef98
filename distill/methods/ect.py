"""ECT, easy consistency tuning: a diffusion model is a consistency model whose gap is as wide as can be; it is narrowed.

    Geng, Pokle, Luo, Lin, Kolter 2024, arXiv 2406.14548 (ICLR 2025)

    r(s) = r(t) max(0, 1 − q^−(stage + 1) n(r)),   n(r) = 1 + 8 sigmoid(−r),   log r(t) ~ N(−1.1, 2²),   r = sigma/alpha
    L = E 1/(r(t) − r(s)) ‖f(x_t, t) − sg f(x_s, s)‖        (not squared; x0 itself where r(s) = 0)

From the teacher's weights and on real data: at first four fifths of all pairs end at the data, which is denoising, what the network does
already. No grid and no target network. The pseudo-Huber distance of iCT is ``metric: pseudo_huber``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.losses.metrics import Metric
from distill.mapping.pairs import Gap, Weighting
from distill.mapping.solvers import Solver
from distill.matching.times import TimeLaw, Times
from distill.methods.consistency import Consistency


class ECT(Consistency):
    """Consistency tuning on real data with a continuous gap that shrinks in stages."""

    name: Literal["ect"] = "ect"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 2
    gap: Gap | None = Gap()
    train_times: TimeLaw = Times(law="log_sigma", mean=-1.1, std=2.0)
    solver: Solver = "data"
    metric: Metric = "norm"
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
    weighting: Weighting = "inverse_gap"
