"""MLCM, multistep latent consistency without data: the states are the teacher's own, segments merge over training.

    Xie et al. 2024, arXiv 2406.05768 (MLCM, TLCM); Heek, Hoogeboom, Salimans 2024, arXiv 2403.06807 (multistep consistency)

    x_t: a state of the guided teacher's trajectory from pure noise;  L = ‖f(x_t, t → e) − sg f(x_s, s → e)‖²,  e the lower edge of the segment

What the teacher said at x_t makes the step to s too. A state at small t has had more of the teacher's steps: one jump from noise would
leave it with the jump's error. No average of weights as the target.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.losses.metrics import Metric
from distill.mapping.points import Trajectories
from distill.methods.consistency import Consistency


class MLCM(Consistency):
    """Segmented consistency at the teacher's own states, without images."""

    name: Literal["mlcm"] = "mlcm"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 8
    trajectories: Trajectories | None = Trajectories(steps=8)
    discretization: Annotated[tuple[int, int], Field()] = (64, 64)
    segments: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [8, 4, 2]
    metric: Metric = "l2"
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
