"""The drifting field: generated features are drawn to real ones and driven off one another (Deng et al. 2026, arXiv 2602.04770).

For a query x, real features p_j and generated ones g_k, with weights A from one softmax over both kinds,

    F(x) = Σ_j Σ_k A_j A_k (p_j − g_k) = m_p m_q (mean-shift to p − mean-shift to q),    m: the weights' sums,

so it vanishes where the two laws agree. For a Gaussian kernel of radius h each mean shift is h² times the score of a kernel density
estimate: F = m_p m_q h² (∇log p_h − ∇log q_h), a score difference without a score network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["exponential", "gaussian"]


def drifting_field(
    x: Tensor, real: Tensor, generated: Tensor, radius: float, kernel: Kernel = "exponential", columns: bool = True, own: bool = True
) -> Tensor:
    """F at each query, (n, d).

    Args:
        x: (n, d) queries; real: (m, d); generated: (k, d).
        radius: of the kernel, in the features' units: exp(−distance/radius) or exp(−distance²/2 radius²).
        columns: A is the geometric mean of the softmax over each row and over each column (as the papers' code): a feature that all
            queries are near to draws none of them in full.
        own: the queries are the generated features themselves; none of them repels itself.
    """
    distance = torch.cdist(x, torch.cat([generated, real]))
    logits = -distance / radius if kernel == "exponential" else -0.5 * (distance / radius) ** 2
    if own:
        logits[:, : len(x)].fill_diagonal_(-torch.inf)
    weight = logits.softmax(1)
    if columns:
        weight = (weight * logits.softmax(0)).clamp_min(1e-12).sqrt()
        if own:
            weight[:, : len(x)].fill_diagonal_(0)
    to_generated, to_real = weight.split([len(generated), len(real)], 1)
    return to_generated.sum(1, keepdim=True) * (to_real @ real) - to_real.sum(1, keepdim=True) * (to_generated @ generated)


@torch.no_grad()
def scale_of(generated: Tensor, real: Tensor) -> float:
    """Mean distance of a generated feature to the others and to the real ones: the unit of the radii."""
    n = len(generated)
    total = torch.cdist(generated, generated).sum() + torch.cdist(generated, real).sum()
    return max(float(total) / (n * (n - 1 + len(real))), 1e-8)


def drifting_loss(generated: Tensor, real: Tensor, radii: Sequence[float], kernel: Kernel = "exponential", columns: bool = True) -> Tensor:
    """mean ‖g/s − sg[g/s + F]‖², F the sum over radii of fields of unit root mean square, s the features' own scale.

    Its value is the field's size and says nothing: only its gradient does. (n, d), (m, d) with n ≥ 2 → scalar.
    """
    scale = scale_of(generated, real)
    with torch.no_grad():
        field = torch.zeros_like(generated)
        for radius in radii:
            part = drifting_field(generated, real, generated, radius * scale, kernel, columns)
            field += part / part.square().mean().sqrt().clamp_min(1e-8)
    scaled = generated / (scale / generated.shape[1] ** 0.5)
    return (scaled - (scaled + field).detach()).square().mean()


def coverage_loss(generated: Tensor, anchors: Tensor, margin: float = 0.5, bandwidth: float = 0.25) -> Tensor:
    """Mean shortfall of the generated features around each anchor (Teacher-Feature Drifting: Zhang, Li et al. 2026):

        relu( margin · support among the anchors − support among the generated ),   support(a; Y) = mean_y exp(−|a − y|/b),

    b = ``bandwidth`` times the anchors' median distance, an anchor not counted among its own. Zero as long as every region keeps
    ``margin`` of the mass that it has among the anchors. (n, d), (m, d) with m ≥ 2 → scalar.
    """
    m = len(anchors)
    with torch.no_grad():
        among = torch.cdist(anchors, anchors)
        others = ~torch.eye(m, dtype=torch.bool, device=anchors.device)
        b = bandwidth * among[others].median().clamp_min(1e-8)
        wanted = margin * ((-among / b).exp() * others).sum(1) / (m - 1)
    support = (-torch.cdist(anchors, generated) / b).exp().mean(1)
    return (wanted - support).clamp_min(0).mean()
