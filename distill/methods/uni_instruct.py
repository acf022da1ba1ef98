"""Uni-Instruct: f-divergences expanded along the diffusion, and their exact gradient.

    Wang et al. 2025, arXiv 2505.20755

    D_f(p‖q) = ∫ ½ g² E_q[h(r) ‖s_p − s_q‖²] dt + const,        h(r) = r² f''(r),  r = p_t/q_t

    L = 2 h(r) (D_T − D_F)·(D_F − x)  +  sg[h − r h'] ‖D_T − D_F‖²  −  sg[r² h'' ‖D_T − D_F‖² (s_p − s_q)]·x_t

in three parts, SIM's, a Fisher part and Diff-Instruct's, differentiated through x and x_t in both networks. Forward KL (h = r) is SIM's
part alone: moments are matched and modes covered. Reverse KL (h = 1) is the Fisher divergence, SiD's a = ½.

h(r) depends on x_t too. Its slope is known in closed form, ∇r = r (s_p − s_q), and is taken along (``live_ratio``): without it, as in the
authors' code, the gradient is another vector field (forward KL on two modes: −0.78 in place of −1.31 for the width,
``distill verify uni_instruct``). r comes from the discriminator as in f-distill, normalised to mean 1 at each t.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from distill.losses.divergence import known_divergence
from distill.matching.adversary import GAN
from distill.matching.objectives import Objective
from distill.matching.times import TimeLaw
from distill.methods.distribution import DistributionMatching


class UniInstruct(DistributionMatching):
    """Uni-Instruct: the expanded forward KL by default."""

    name: Literal["uni_instruct"] = "uni_instruct"  # type: ignore[assignment]
    objective: Objective = "expanded"
    divergence: Annotated[str, AfterValidator(known_divergence)] = "forward_kl"
    score_times: TimeLaw = (0.02, 0.8)
    gan: GAN | None = GAN()
