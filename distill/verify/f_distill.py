"""f-distill's preset: the gradient of its divergence, and what the two normalisations of the ratio leave alone.

(The gradients of all divergences, and their optima on two modes: ``verify/dmd2.py``.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.analytic import AffineGenerator
from distill.losses.divergence import RatioNormalizer
from distill.matching.adversary import GAN
from distill.methods.f_distill import FDistill
from distill.verify.core import Check, at_most, relative_error
from distill.verify.dmd2 import STUDENT, close_modes, divergence_value
from distill.verify.quadrature import LEVELS, gradient_of, yielded


def exact(t: float, divergence: str = "jensen_shannon") -> FDistill:
    """Ratios as they are, the weight of the divergence itself; the GAN is there for its discriminator alone."""
    gan = GAN(weight=1e-30, features="teacher", layers=["state"])
    return FDistill(divergence=divergence, weighting="exact", score_times=(t, t), ratio_normalization="none", gan=gan)


def checks() -> Iterator[Check]:
    default = FDistill().divergence
    for name, (schedule, t) in LEVELS.items():
        generator, time = AffineGenerator(schedule, *STUDENT), torch.tensor([t], dtype=torch.float64)
        wanted = gradient_of(divergence_value("jensen_shannon", close_modes(schedule), generator.law(), time, torch.ones(1)), generator)
        yield at_most("f_distill", f"{default}: its gradient, {name}", relative_error(yielded(exact(t, default), schedule), wanted), 1e-3)
        plain = yielded(exact(t, "reverse_kl"), schedule)
        best = plain * (plain @ wanted / plain.square().sum())
        yield at_most("f_distill", f"ablation: no weight h(r), scaled to fit best, {name}", relative_error(best, wanted), 1e-3, must_fail=True)
    yield from normalization_checks()


def normalization_checks() -> Iterator[Check]:
    """A discriminator whose logits are off by a number for each t: E_q r = 1 puts it right."""
    torch.manual_seed(0)
    t = torch.rand(4096, dtype=torch.float64)
    logits = torch.randn(4096).clamp(-1, 1)
    wrong = logits + (10 * t).floor() / 20  # constant in each of the ten bins
    first, second = (weights("jensen_shannon", value, t) for value in (logits, wrong))
    yield at_most("f_distill", "logits off by a function of t: change of the weights", relative_error(second, first), 1e-4)
    off = relative_error(weights("jensen_shannon", wrong, t, bins=1), weights("jensen_shannon", logits, t, bins=1))
    yield at_most("f_distill", "ablation: one bin for all t", off, 1e-4, must_fail=True)
    yield at_most("f_distill", "mean of the weights, off 1 by", abs(float(first.mean()) - 1), 1e-4)


def weights(divergence: str, logits: Tensor, t: Tensor, bins: int = 10) -> Tensor:
    normalizer = RatioNormalizer(bins=bins, decay=0.0)
    return normalizer.weight(divergence, logits, t, normalizer.initial_state())
