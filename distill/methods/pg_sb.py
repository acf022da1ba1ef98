"""PG-SB, SNOOPI's training: VSD whose guidance scale is drawn at random, and shared by teacher and critic.

    Nguyen et al. 2024, SNOOPI, arXiv 2412.02687

    g = alpha sigma (D_F^w − D_T^w)(x_t, t, c),        w ~ U[0.5, 4]  (Stable Diffusion; U[0.5, 3] for PixArt)

The fixed point of VSD is the same for every w, so a random one changes no optimum: it averages over the directions in which
one fixed scale errs. Below 1 the condition is played down. The paper draws w once for a batch, we for each sample: the same mean
gradient with less variance. (SNOOPI's other half, negative prompts in the attention of the sampler, trains nothing.)
"""

from __future__ import annotations

from typing import Literal

from distill.methods.distribution import DistributionMatching, Scale, Weighting


class PGSB(DistributionMatching):
    """Proper guidance for SwiftBrush: VSD under a random guidance scale."""

    name: Literal["pg_sb"] = "pg_sb"  # type: ignore[assignment]
    weighting: Weighting = "eps"
    guidance_scale: Scale | tuple[Scale, Scale] = (0.5, 4.0)
    critic_guidance_scale: Scale | Literal["same"] = "same"
    critic_null: float = 0.1
    critic_steps: int = 1  # type: ignore[assignment]
