"""DMD2 and f-distill: match the student's noised distribution to the teacher's, in one or a few steps.

    DMD2       Yin et al. 2024, arXiv 2405.14867      f-distill  Xu, Nie, Vahdat 2025, arXiv 2502.15681

The student's sample x receives the gradient of an f-divergence between the noised laws of student and teacher,

    g = w(t) h(r) (D_critic − D_teacher)(x_t, t),          x_t = alpha x + sigma noise,

with h = 1 for reverse KL (DMD2) and h(r) = r² f''(r) in general, r the density ratio that the discriminator estimates.
The critic learns the student's own denoiser by denoising score matching, several updates per student update (two time
scales); a GAN term on hidden features compares noised student samples with noised real ones. Multi-step students are
trained on their own intermediate samples (backward simulation).
"""

from __future__ import annotations

from typing import Literal

from distill.methods.distribution import DistributionMatching


class DMD2(DistributionMatching):
    """Distribution matching distillation (DMD2), with a choice of divergence (f-distill): the engine as it is."""

    name: Literal["dmd2"] = "dmd2"  # type: ignore[assignment]
