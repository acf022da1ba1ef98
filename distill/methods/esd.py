"""ESD, entropic score distillation: VSD with a bonus for the entropy over all conditions, as guidance of the critic below one.

    Wang et al. 2024, arXiv 2401.00909

    g = w(t) [lambda s_q(x_t) + (1 − lambda) s_q(x_t|c) − s_p(x_t|y)],        so: critic D_u + (1 − lambda)(D_c − D_u)

It minimises E_c KL(q(x|c)‖p(x|y)) − lambda I(x; c): lambda = 0 is VSD, which may draw every condition into one mode; lambda = 1 matches the
mixture over c alone. Where the teacher does not know c (a camera, a seed) the samples of different c are pushed apart until together
they fill the teacher's law. Where it knows c, as for class labels, the same term makes classes more distinct than the teacher's:
small lambdas. ``critic_guidance_scale`` is 1 − lambda; the critic has to learn the marginal, hence ``critic_null``.
"""

from __future__ import annotations

from typing import Literal

from distill.methods.distribution import DistributionMatching, Scale, Weighting


class ESD(DistributionMatching):
    """Entropic score distillation, lambda 0.5."""

    name: Literal["esd"] = "esd"  # type: ignore[assignment]
    weighting: Weighting = "eps"
    critic_guidance_scale: Scale | Literal["same"] = 0.5
    critic_null: float = 0.3
