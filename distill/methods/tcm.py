"""TCM, truncated consistency: a second stage for the noise levels that a one-step sample starts from.

    Lee et al. 2024, arXiv 2410.14895 (ICLR 2025)

    first stage ECT; then, for t > t' alone, the same pairs with f⁻ = the first stage's student, frozen, where s ≤ t', and 0.1 times the
    loss of a quarter of the batch that lies at t'

(mapping/truncation.py.) The student is to be sampled in one step, or in two with the second one at t'; below t' it forgets. What the first
stage got wrong at t' is inherited.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.losses.metrics import Metric
from distill.mapping.pairs import Gap, Weighting
from distill.mapping.solvers import Solver
from distill.mapping.truncation import Truncation
from distill.matching.times import TimeLaw, Times, UnitInterval
from distill.methods.consistency import Consistency


class TCM(Consistency):
    """Two-stage truncated consistency tuning."""

    name: Literal["tcm"] = "tcm"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 2
    times: list[UnitInterval] | None = [1.0, 0.5]
    gap: Gap | None = Gap()
    train_times: TimeLaw = Times(law="log_sigma", mean=-1.1, std=2.0)
    solver: Solver = "data"
    metric: Metric = "norm"
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
    weighting: Weighting = "inverse_gap"
    truncation: Truncation | None = Truncation()
