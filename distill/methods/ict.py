"""iCT, improved consistency training: from real data alone, on a grid that doubles, with noise levels and weights of its own.

    Song & Dhariwal 2023, arXiv 2310.14189 (ICLR 2024)

    L = E_i 1/(r_{i+1} − r_i) d( f(x_{i+1}, t_{i+1}), sg f(x_i, t_i) ),   d = √(‖·‖² + c²) − c,  c = 0.00054 √d

x_i and x_{i+1} share their noise; i has the mass that log r ~ N(−1.1, 2²) gives its interval (r = sigma/alpha); N doubles from 10 to 1280 in equal
parts of the training. The target is the student itself: with a lagging one the fixed point is wrong as N grows. No network here has
dropout at work, which the paper shares between the two passes.

N/(the grid) is even in the schedule's own t, which is Karras' with rho = 7 for EDM's schedules only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.mapping.pairs import Weighting
from distill.mapping.solvers import Solver
from distill.matching.times import TimeLaw, Times
from distill.methods.consistency import Consistency


class ICT(Consistency):
    """Consistency training on real data, a doubling grid, no teacher."""

    name: Literal["ict"] = "ict"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 2
    discretization: Annotated[tuple[int, int], Field()] = (10, 1280)
    train_times: TimeLaw = Times(law="log_sigma", mean=-1.1, std=2.0)
    solver: Solver = "data"
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
    weighting: Weighting = "inverse_gap"
