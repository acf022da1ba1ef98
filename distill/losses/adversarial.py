"""Discriminators: small heads on hidden features of a denoiser (DMD2: Yin et al. 2024, sec. 4.3; LADD: Sauer et al. 2024), or
on those of fixed random convolutions; and the losses that they play for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError
from distill.imports import import_object


class FeatureHead(nn.Module):
    """A small head on one feature map: (batch, channels, ...) or (batch, tokens, channels) → (batch,) logits.

    Args:
        told: width of a vector that the head is told beside the features: it adds ⟨V c, h⟩ to the logit, h its last hidden layer
            (projection discriminator: Miyato & Koyama 2018). 0: none.
    """

    def __init__(self, channels: int, hidden: int, spatial: bool, told: int = 0) -> None:
        super().__init__()
        self.spatial = spatial
        self.projection = nn.Linear(told, hidden, bias=False) if told else None
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

    def forward(self, features: Tensor, told: Tensor | None = None) -> Tensor:
        h = self.net[:-1](features)
        logit = self.net[-1](h).flatten(1).mean(1)
        if self.projection is None or told is None:
            return logit
        places = h.flatten(2).mean(2) if self.spatial else h.reshape(len(h), -1, h.shape[-1]).mean(1)
        return logit + (self.projection(told) * places).sum(1) / places.shape[1] ** 0.5


class Discriminator(nn.Module):
    """One head per named feature; each is a judge of its own, and the losses average over them.

    Args:
        shapes: the features' shapes without the batch, by name: (C, H, W) convolutional, (tokens, C) or (C,) otherwise.
        body: (x_t, t) → named features, where they are not a backbone's; its parameters, if it has any, are trained too.
        told: width of ``condition_vector``, for a body, which does not see the condition; a backbone's features have seen it.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], hidden: int = 64, body: nn.Module | None = None, told: int = 0) -> None:
        super().__init__()
        self.names, self.body = tuple(shapes), body
        self.heads = nn.ModuleList(
            FeatureHead(shape[0] if len(shape) == 3 else shape[-1], hidden, len(shape) == 3, told) for shape in shapes.values()
        )

    def forward(self, features: Mapping[str, Tensor], told: Tensor | None = None) -> Tensor:
        """Logits, (batch, heads)."""
        logits = [head(features[name].float(), told) for name, head in zip(self.names, self.heads, strict=True)]
        return torch.stack(logits, dim=1)

    def of_samples(self, x_t: Tensor, t: Tensor, told: Tensor | None = None) -> Tensor:
        """Logits of noised samples, through the body."""
        assert self.body is not None
        return self(self.body(x_t, t), told)


#: A class's number c becomes the sines and cosines of 2π c √p: no two whole numbers have nearly equal ones.
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131)


def condition_vector(values: Mapping[str, Any], batch: int, device: torch.device) -> Tensor:
    """(batch, width) of whatever a condition consists of: token embeddings by their mean, numbers (of classes) by sines and cosines
    that make any two of them nearly orthogonal (see PRIMES). Width 0 where nothing is told."""
    parts = [torch.zeros(batch, 0, device=device)]
    for _, value in sorted(values.items()):
        entries = list(value) if not isinstance(value, Tensor) or value.dim() > 2 else None
        if entries is not None:  # one per sample, of shapes of their own
            if not all(isinstance(e, Tensor) and e.is_floating_point() and e.dim() for e in entries):
                continue
            value = torch.stack([e.reshape(-1, e.shape[-1]).mean(0) for e in entries])
        if value.is_floating_point() and value.dim() == 2:
            parts.append(F.layer_norm(value.float(), value.shape[-1:]))
        elif value.dim() == 1:
            roots = torch.tensor(PRIMES, dtype=torch.float64).sqrt() * (2 * math.pi)
            angle = value.cpu().double()[:, None] * roots
            parts.append(torch.cat([angle.sin(), angle.cos()], 1).float())
    return torch.cat([p.to(device) for p in parts], 1)


class RandomFeatures(nn.Module):
    """Features of noised samples from convolutions that are drawn once and never trained, at several sizes (in the place of
    Projected GAN's pretrained ones: Sauer et al. 2021): nothing of a reference data set leaks into them.

    The noise level is a channel of the input. (batch, C, H, W) or (batch, d), which is taken as d pixels in a row.
    """

    def __init__(self, channels: int, spatial: bool = True, width: int = 64, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.spatial, self.depth = spatial, depth
        size = (3, 3) if spatial else (1, 1)
        for i in range(depth):
            before = channels + 1 if i == 0 else width
            weight = torch.randn(width, before, *size, generator=generator) * (2 / (before * size[0] * size[1])) ** 0.5
            self.register_buffer(f"weight_{i}", weight)
            self.register_buffer(f"bias_{i}", 0.2 * torch.randn(width, generator=generator))

    def forward(self, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        h = x_t.float() if self.spatial else x_t.float()[..., None, None]
        level = t.to(h).expand(len(h)).reshape(-1, 1, 1, 1).expand(-1, 1, *h.shape[2:])
        h, features = torch.cat([h, level], 1), {}
        for i in range(self.depth):
            weight, bias = getattr(self, f"weight_{i}"), getattr(self, f"bias_{i}")
            h = F.leaky_relu(F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2), 0.2)
            features[f"random_{i}"] = h if self.spatial else h.flatten(1)
            if self.spatial and min(h.shape[2:]) >= 4:
                h = F.avg_pool2d(h, 2)
        return features


def feature_body(name: str, shape: Sequence[int]) -> nn.Module:
    """The features of noised samples by name: ``random``, ``projected``, or the import path ``module:Class`` of a user's own, which
    is made with the samples' shape and maps (x_t, t) to named features. What of it needs no gradient is never trained.

    Raises:
        ValueError: if there is none.
        UserError: if it cannot be had here.
    """
    if name == "random":
        if len(shape) not in (1, 3):
            raise UserError(f"gan.features random looks at images, and these samples are {'×'.join(map(str, shape))}: use teacher or critic")
        return RandomFeatures(shape[0], spatial=len(shape) == 3)
    if name == "projected":
        from distill.losses.projected import ProjectedFeatures

        return frozen(ProjectedFeatures(tuple(shape)))
    made: nn.Module = import_object(name)(tuple(shape))
    return frozen(made)


def frozen(module: nn.Module) -> nn.Module:
    """The module with its parameters that need no gradient turned into buffers: no optimizer and no checkpoint sees them."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if not p.requires_grad:
                delattr(part, name)
                part.register_buffer(name, p.data)
    return module


# -- losses -------------------------------------------------------------------------------------------------------------

AdversarialLoss = Literal["logistic", "hinge", "relativistic"]


@dataclass(frozen=True)
class Adversarial:
    """The two sides of a game; all means over batch and heads."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  #: (real logits, fake logits)
    generator: Callable[[Tensor, Tensor | None], Tensor]  #: (fake logits, real logits where the game needs them)


def _relativistic_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    assert real is not None
    return F.softplus(real - fake).mean()


ADVERSARIAL: dict[str, Adversarial] = {
    # non-saturating logistic (Goodfellow et al. 2014): the optimal logit is a log density ratio
    "logistic": Adversarial(lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(), lambda fake, _: F.softplus(-fake).mean()),
    "hinge": Adversarial(lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake, _: -fake.mean()),
    # pairs of one real and one fake (Jolicoeur-Martineau 2018; R3GAN: Huang et al. 2024)
    "relativistic": Adversarial(lambda real, fake: F.softplus(fake - real).mean(), _relativistic_generator),
}


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)
