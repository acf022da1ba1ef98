"""TBCM, trajectory-backward consistency: points and velocities from the guided teacher's own way from noise to samples.

    Tang et al. 2025, arXiv 2511.20410

    x_{j+1} = DDIM(x_j, D_T(x_j, t_j); t_j → t_{j+1}),   one t_j drawn in each of n parts of [0, 1];   then sCM's loss at all (x_j, t_j, D_T)

No images, no autoencoder, no further call of the teacher, and the student learns where it will be asked. r (the derivative's share of the
tangent) rises as sCM's, and falls again in the last part of the training: ``calm_down``. A batch is ``trajectories.steps`` times as large.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.mapping.points import Trajectories
from distill.mapping.tangent import Tangent
from distill.methods.consistency import Consistency


class TBCM(Consistency):
    """sCM on the teacher's trajectories, without images."""

    name: Literal["tbcm"] = "tbcm"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 2
    trajectories: Trajectories | None = Trajectories(steps=8)
    tangent: Tangent | None = Tangent(calm_down=(0.8, 0.5))
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
