"""VSD, variational score distillation, as SwiftBrush has it: guidance on teacher and critic alike, the critic a LoRA on the teacher.

    VSD         Wang et al. 2023, ProlificDreamer, arXiv 2305.16213
    SwiftBrush  Nguyen & Tran 2024, arXiv 2312.05239

    g = sigma² (e_T^w − e_F^w)(x_t, t, c) = alpha sigma (D_F^w − D_T^w),        D^w = D_u + w (D_c − D_u),  one w for both

Guided alike, teacher and critic agree where the student's law is the teacher's own, for every w: the scale weighs the errors of
the class against the others, and does not sharpen the classes as guidance on the teacher alone does (DMD's convention:
``critic_guidance_scale: 1``). The critic is guided, so it learns a share of its samples without their condition.
``critic: {weights: lora}`` beside a student with full weights makes the critic an adapter on the teacher: two networks for three.
A fresh adapter changes nothing, so the first update of the student is exactly zero.
"""

from __future__ import annotations

from typing import Literal

from distill.methods.distribution import DistributionMatching, Scale, Weighting


class VSD(DistributionMatching):
    """Variational score distillation (SwiftBrush)."""

    name: Literal["vsd"] = "vsd"  # type: ignore[assignment]
    weighting: Weighting = "eps"
    guidance_scale: Scale | tuple[Scale, Scale] = 4.5
    critic_guidance_scale: Scale | Literal["same"] = "same"
    critic_null: float = 0.1
    critic_steps: int = 1  # type: ignore[assignment]
