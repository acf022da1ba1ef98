"""What the difference of teacher and critic is made into. All in x0 units: D_T, D_F are the two x0-predictions at x_t,

    s_p − s_q = (alpha/sigma²)(D_T − D_F).

    kl        the gradient of D_f(q_t‖p_t) injected into x: w h(r) (D_F − D_T); no graph through the networks
              (Diff-Instruct, VSD, DMD; h(r) = r² f''(r): f-distill)
    sid       (D_T − D_F)·[(D_T − x) − a (D_T − D_F)] (SiD: Zhou et al. 2024, eq. 23). a = ½ is half of the exact Fisher divergence's
              gradient, a = 1 is SIM with the squared norm, a = 1.2 the paper's choice
    sim       d'(D_T − D_F)·(D_F − x), d the pseudo-Huber distance of the whole sample (SIM: Luo et al. 2024)
    expanded  the exact gradient of ∫ ½ g² E_q[h(r) |s_p − s_q|²] dt, f-divergences expanded along the diffusion (Uni-Instruct:
              Wang et al. 2025), in three parts (guide, 0.5)

All but ``kl`` are differentiated through x_t in both networks. Reduction: the mean over all elements, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distill.losses.divergence import Weight
from distill.schedule import expand_to

Objective = Literal["kl", "sid", "sim", "expanded", "none"]
LIVE: tuple[Objective, ...] = ("sid", "sim", "expanded")  #: differentiated through x_t in both networks


def injected(x: Tensor, g: Tensor) -> Tensor:
    """A loss whose gradient in x is g / numel: ½ mean ‖x − sg[x − g]‖². (The mean is over every element: all losses of
    the toolkit reduce so, and their weights compare.)"""
    return 0.5 * (x - (x - g).detach()).square().mean()


def sid_loss(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SiD's; ``weight`` (batch, 1, …)."""
    difference = real - fake
    return (weight * difference * ((real - x) - alpha * difference)).mean()


def sim_loss(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor, c: float | None) -> Tensor:
    """SIM's. ``c`` is the pseudo-Huber distance's, of the root mean square; None: the squared norm, d'(y) = y."""
    difference = real - fake
    if c is not None:
        size = expand_to(difference.flatten(1).square().mean(1), x)
        difference = difference / (size + c**2).sqrt()
    return (weight * difference * (fake - x)).mean()


def expanded_loss(
    x: Tensor, x_t: Tensor, real: Tensor, fake: Tensor, weight: Tensor, ratio: Tensor, h: Weight, scale: Tensor, live_ratio: bool = True
) -> Tensor:
    """Uni-Instruct's, exact for every f-divergence:

        2 h(r) (D_T − D_F)·(D_F − x)  +  sg[h − r h'] |D_T − D_F|²  −  sg[r² h'' |D_T − D_F|² (s_p − s_q)]·x_t

    Args:
        ratio: (batch,) r = p_t/q_t at x_t.
        h: its weight h(r) with two derivatives.
        scale: alpha/sigma² at t, (batch, 1, …).
        live_ratio: h is differentiated too, by ∇r = r (s_p − s_q). Without it (as the papers' code) forward KL is biased.
    """
    difference = real - fake
    value, first, second = (shaped(v, x) for v in derivatives(h, ratio))
    r, score = shaped(ratio, x).to(x), (scale * difference).detach()
    if live_ratio:
        moved = (score * (x_t - x_t.detach())).flatten(1).sum(1)
        value = value + (first * r) * shaped(moved, x)
    d = difference.numel() / len(difference)  # a mean over elements of one that is a sum over the sample
    squared = shaped(difference.square().flatten(1).sum(1) / d, x)
    parts = 2 * value * difference * (fake - x) + (value.detach() - r * first) * squared
    drift = -(r**2 * second) * shaped(difference.detach().square().flatten(1).sum(1), x) * score
    return (weight * (parts + drift * x_t)).mean()


def derivatives(h: Callable[[Tensor], Tensor], r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, h', h'') at each r, float64, without a graph."""
    with torch.enable_grad():
        r = r.detach().double().requires_grad_()
        value = h(r) + 0 * r
        (first,) = torch.autograd.grad(value.sum(), r, create_graph=True)
        (second,) = torch.autograd.grad((first + 0 * r).sum(), r)
    return value.detach(), first.detach(), second.detach()


def shaped(value: Tensor, x: Tensor) -> Tensor:
    """(batch,) → (batch, 1, …) in x's dtype: it multiplies x."""
    return expand_to(value.to(x), x)


