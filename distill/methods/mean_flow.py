"""MeanFlow: the average velocity by its own differential identity, from real data, with no teacher and no curriculum.

    Geng, Deng, Bai, Kolter, He 2025, "Mean Flows for One-step Generative Modeling", arXiv 2505.13447

    U = v − (tau_t − tau_s) dU/dtau,     dU/dtau along (v, 1, 0): v = noise − x0 in place of the velocity that it is a sample of     (eq. 8 to 11)

The right-hand side is linear in v, so that its mean is the identity's. Where s = t it is flow matching. The paper's pairs, for long trainings:
``{times: {law: logit_normal, mean: -0.4}, diagonal: 0.75}``; these draw the one long step more often, which such a law hardly ever does.
``guidance_scale`` w folds guidance into the field that is learnt: v → u_null + w (v − u_null) (their eq. 19, with kappa = 0).

    Restricted MeanFlow (Zou et al. 2026, DisCa, arXiv 2602.05449):   pairs: {interval: 0.2}      few-step students for whom one step is too far
    distilled from a teacher:                                         velocity: teacher, guidance_scale: w; power: 0.5 or 0
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.matching.time_pairs import TimePairs
from distill.methods.flow_map import FlowMap, Target


class MeanFlow(FlowMap):
    """MeanFlow."""

    name: Literal["mean_flow"] = "mean_flow"  # type: ignore[assignment]
    target: Target = "eulerian"
    velocity: Literal["teacher", "data", "own"] = "data"
    pairs: TimePairs = TimePairs(diagonal=0.5, to_data=0.2, from_noise=0.2)
    power: Annotated[float, Field(ge=0, le=1)] = 1.0
