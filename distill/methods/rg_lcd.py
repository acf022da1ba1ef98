"""RG-LCD, reward-guided latent consistency: LCM's loss minus a reward of the one-step output, through a stand-in that is learnt online.

    Li, Feng, Chen, Wang 2024, arXiv 2403.11027 (TMLR 2024)

    L = L_LCD − β R(f(x_t, t)),     R the expert itself (``terms: [{kind: reward, function: …}]``) or its latent stand-in (``proxy: {function: …}``)

(mapping/proxy.py.) Differentiated through decoder and expert, the student finds what pleases the expert and nobody else; the stand-in is
taught by the expert's preferences among the student's samples, their targets and real ones, and needs no gradient of it. The paper's
stand-in is a pretrained latent CLIP; here heads on the frozen teacher's features. Without either it is LCM.
"""

from __future__ import annotations

from typing import Literal

from distill.losses.metrics import Metric
from distill.methods.consistency import Consistency


class RGLCD(Consistency):
    """LCM with a reward through a latent stand-in."""

    name: Literal["rg_lcd"] = "rg_lcd"  # type: ignore[assignment]
    metric: Metric = "pseudo_huber_elementwise"
