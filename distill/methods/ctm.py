"""CTM, consistency trajectory models: any jump along the teacher's trajectory, compared where both arrive at data.

    Kim, Lai et al. 2023, "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion", arXiv 2310.02279

    X(x, t → s) = (sigma_s/sigma_t) x + (1 − sigma_s/sigma_t) g(x, t, s)  for alpha = 1                                          (eq. 4)
    d( X⁻(X(x_t, t → s), s → 0),  X⁻(X⁻(Solver(x_t, t → m), m → s), s → 0) ),     s ≤ m < t random, X⁻ the averaged weights       (eq. 6)
    + denoising of real data by g(x, t, t):   the share of the batch with s = t                                                   (eq. 8)
    + an adversary of the jumps to data                                                                                           (eq. 9)

The denoising term is balanced with the first by the norms of their gradients, as in the paper (there at the last layer, here at U); the
adversary's weight is a setting. Its distance is LPIPS; here the mean square. Its averaged weights' decay is 0.999, for long trainings.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.matching.time_pairs import TimePairs
from distill.methods.flow_map import FlowMap, Target


class CTM(FlowMap):
    """Consistency trajectory models."""

    name: Literal["ctm"] = "ctm"  # type: ignore[assignment]
    target: Target = "teacher_step"
    velocity: Literal["teacher", "data", "own"] = "data"
    network: Literal["stop_gradient", "ema"] = "ema"
    balance: bool = True
    reach: Annotated[float, Field(gt=0, le=1)] = 1.0
    solver_steps: Annotated[int, Field(ge=1)] = 8
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    compare: Literal["end", "data"] = "data"
    pairs: TimePairs = TimePairs(to_data=0.2)
