"""f-divergence weightings of the score-matching gradient (f-distill: Xu, Nie, Vahdat 2025, arXiv 2502.15681).

With r = p/q (teacher over student) and D_f(p‖q) = E_q f(r), the gradient of the divergence in the student's parameters is

    grad = − E[ h(r) (s_p − s_q)(x_t) · dx_t/dtheta ],      h(r) = r² f''(r)

so a divergence is a weight on the reverse-KL gradient, for which h = 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.imports import import_object

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "squared_hellinger", "jeffreys", "neyman"
]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)

#: f(r), up to affine terms in r, which change no divergence.
GENERATORS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}

_WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
}


Weight = Callable[[Tensor], Tensor]


def known_divergence(name: str) -> str:
    """The name, if there is such a divergence or such an import path.

    Raises:
        ValueError: if not.
    """
    find_weight(name)
    return name


def find_weight(divergence: str) -> Weight:
    """h of a divergence by name, or by the import path ``module:function`` of its f(r), whose second derivative is taken
    by automatic differentiation.

    Raises:
        ValueError: if there is none.
    """
    if divergence in DIVERGENCES:
        return _WEIGHTS[divergence]
    if ":" not in divergence:
        close = difflib.get_close_matches(divergence, DIVERGENCES, 1)
        known = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(map(repr, DIVERGENCES))
        raise ValueError(f"there is no divergence {divergence!r}; {known} (or the import path of your own f, module:function)")
    f = import_object(divergence)

    def h(r: Tensor) -> Tensor:
        with torch.enable_grad():
            live = r if r.requires_grad else r.detach().requires_grad_()
            (first,) = torch.autograd.grad(f(live).sum(), live, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), live, create_graph=r.requires_grad)
        return live**2 * second if r.requires_grad else (r**2 * second).detach()

    return h


def divergence_weight(divergence: str, ratio: Tensor) -> Tensor:
    """h(r) = r² f''(r), elementwise; ``ratio`` = teacher density over student density."""
    return find_weight(divergence)(ratio)


class RatioNormalizer:
    """From discriminator logits to f-distill's weights, by the paper's two normalisations.

    1. r = exp(logit), clipped, divided by its running mean in bins of t: E_q[r] = 1 must hold at every t.
    2. h(r) divided by its mean over the batch, so that the overall strength equals reverse KL's.

    The bins' means are running statistics: they live in ``state`` (checkpointed by the trainer), shape (bins,).

    Args:
        bins: number of equal bins of t over ``times``.
        decay: of the running means; 0 uses the current batch alone (the paper: 0 for CIFAR-10, 0.5 for ImageNet).
    """

    def __init__(
        self, times: tuple[float, float] = (0.0, 1.0), bins: int = 10, decay: float = 0.5,
        max_logit: float = 10.0, clip: tuple[float, float] = (0.1, 20.0),
    ) -> None:
        self.times, self.bins, self.decay, self.max_logit, self.clip = times, bins, decay, max_logit, clip

    def initial_state(self) -> Tensor:
        return torch.ones(self.bins)

    def ratio(self, logits: Tensor, t: Tensor, bin_means: Tensor) -> Tensor:
        """r at each sample, (batch,); updates ``bin_means`` in place."""
        r = logits.detach().float().clamp(-self.max_logit, self.max_logit).exp().clamp(*self.clip)
        low, high = self.times
        index = ((t.to(r) - low) / (high - low) * self.bins).long().clamp(0, self.bins - 1)
        count = torch.zeros_like(bin_means).index_add_(0, index, torch.ones_like(r))
        total = torch.zeros_like(bin_means).index_add_(0, index, r)
        blended = self.decay * bin_means + (1 - self.decay) * total / count.clamp_min(1)
        bin_means.copy_(torch.where(count > 0, blended, bin_means))
        return r / (bin_means[index] + 1e-6)

    def weight(self, divergence: str, logits: Tensor, t: Tensor, bin_means: Tensor) -> Tensor:
        """h(r)/mean h(r), (batch,), mean 1."""
        h = divergence_weight(divergence, self.ratio(logits, t, bin_means))
        return h / (h.mean() + 1e-6)
