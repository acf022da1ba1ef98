"""f-distill: DMD2 whose gradient is weighted by the density ratio, which makes it that of another f-divergence.

    Xu, Nie, Vahdat 2025, arXiv 2502.15681

    g = h(r) (D_F − D_T)(x_t) / mean|x − D_T|,        h(r) = r² f''(r),  r = p_t/q_t = exp(logit of the discriminator)

Jensen–Shannon, h = r/(1 + r), is the paper's best on ImageNet: it covers what forward KL covers (h = r) with weights that are
bounded. r is clipped and divided by its mean at each t (E_q r = 1), h by its mean over the batch, so that the strength is DMD2's.
The ratio is read from a discriminator, so real samples and a ``gan`` section with the logistic loss are needed. With a guided teacher
r is that of the data, not of the guided law: a heuristic there.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from distill.losses.divergence import known_divergence
from distill.matching.adversary import GAN
from distill.methods.distribution import DistributionMatching


class FDistill(DistributionMatching):
    """f-distill: one-step students by an f-divergence, Jensen–Shannon by default."""

    name: Literal["f_distill"] = "f_distill"  # type: ignore[assignment]
    divergence: Annotated[str, AfterValidator(known_divergence)] = "jensen_shannon"
    gan: GAN | None = GAN()
