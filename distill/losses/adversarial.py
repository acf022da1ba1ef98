"""Diffusion-GAN heads on hidden features of a denoiser (DMD2: Yin et al. 2024, sec. 4.3; LADD: Sauer et al. 2024).

With the non-saturating logistic loss the optimal logit is log p_data/q at (x_t, t, condition): a density ratio, which
the f-divergence weights need. (A hinge loss has no such reading, so none is offered here.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureHead(nn.Module):
    """A small head on one feature map: (batch, channels, ...) or (batch, tokens, channels) → (batch,) logits."""

    def __init__(self, channels: int, hidden: int, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        if spatial:
            self.net = nn.Sequential(
                nn.Conv2d(channels, hidden, 4, stride=2, padding=1), nn.GroupNorm(_groups(hidden), hidden), nn.SiLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1), nn.GroupNorm(_groups(hidden), hidden), nn.SiLU(),
                nn.Conv2d(hidden, 1, 1),
            )
        else:
            self.net = nn.Sequential(
                nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.SiLU(),
                nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, 1),
            )

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features).flatten(1).mean(1)


class Discriminator(nn.Module):
    """One head per named feature; each is a judge of its own, and the losses average over them.

    Args:
        shapes: the features' shapes without the batch, by name: (C, H, W) convolutional, (tokens, C) or (C,) otherwise.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], hidden: int = 64) -> None:
        super().__init__()
        self.names = tuple(shapes)
        self.heads = nn.ModuleList(
            FeatureHead(shape[0] if len(shape) == 3 else shape[-1], hidden, spatial=len(shape) == 3)
            for shape in shapes.values()
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits, (batch, heads)."""
        logits = [head(features[name].float()) for name, head in zip(self.names, self.heads, strict=True)]
        return torch.stack(logits, dim=1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(−l_real) + softplus(l_fake), averaged over batch and heads."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """softplus(−l_fake), averaged over batch and heads (non-saturating)."""
    return F.softplus(-fake).mean()


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)
