"""Maximum mean discrepancy in the features of random networks (EL: Ying et al. 2026)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def random_embedding(like: Tensor, width: int, depth: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A random network → (batch, features), not trained: of images (batch, C, H, W), videos (batch, C, F, H, W; the mean over frames),
    tokens (batch, tokens, C; the mean over tokens) or vectors (batch, d).

    Convolutions with instance-free nonlinearities, variance-preserving, pooled to a few places; for tokens and vectors, linear layers.
    The nonlinearity matters: a linear map sees means alone.
    """
    generator = torch.Generator().manual_seed(seed)
    spatial = like.dim() >= 4

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(like.device, torch.float32)

    layers, before = [], like.shape[1] if spatial else like.shape[-1]
    for _ in range(depth):
        fan = before * 9 if spatial else before
        layers.append((draw(width, before, *((3, 3) if spatial else ()), scale=(2 / fan) ** 0.5), draw(width, scale=0.5)))
        before = width

    def embed(x: Tensor) -> Tensor:
        h = x.float()
        if h.dim() == 5:
            h = h.transpose(1, 2).flatten(0, 1)
        for weight, bias in layers:
            h = F.relu(F.conv2d(h, weight, bias, padding=1) if spatial else F.linear(h, weight, bias))
            if spatial and min(h.shape[2:]) >= 4:
                h = F.avg_pool2d(h, 2)
        if x.dim() in (3, 5):
            return h.reshape(len(x), -1, h[0].numel() if x.dim() == 5 else h.shape[-1]).mean(1)
        return h.flatten(1)

    return embed


def squared_discrepancy(a: Tensor, b: Tensor, groups: Tensor | None = None) -> Tensor:
    """Unbiased estimate of ‖E a − E b‖² / features over (n, features) and (n, features): the U-statistic

        mean_{i≠i'} ⟨a_i, a_i'⟩ − 2 mean_{ij} ⟨a_i, b_j⟩ + mean_{j≠j'} ⟨b_j, b_j'⟩.

    Args:
        groups: (n,) of both: only members of equal groups are compared; groups of one have no say.
    """
    n, features = a.shape
    same = torch.ones(n, n, dtype=torch.bool, device=a.device) if groups is None else groups[:, None] == groups[None]
    others = same & ~torch.eye(n, dtype=torch.bool, device=a.device)
    size = same.sum(1)
    useful = (size > 1).to(a)
    # Each sample weighs the same: a group of k counts k times its own discrepancy.
    within = others.to(a) / (size - 1).clamp_min(1)[:, None].to(a)
    across = same.to(a) / size[:, None].to(a)
    value = (within * (a @ a.T)).sum(1) + (within * (b @ b.T)).sum(1) - 2 * (across * (a @ b.T)).sum(1)
    return (useful * value).sum() / useful.sum().clamp_min(1) / features
