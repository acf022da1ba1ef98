"""The digits metric: a small classifier of the 8×8 digits whose penultimate features stand in for Inception's.

The network ships in assets/digits-features.safetensors; tools/train_features.py makes it. Its features are standardised
with the mean and the deviation of the training images, so that each of the 64 weighs alike in a Fréchet distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.resources import resource

FEATURES = 64  #: width of the features

_CHUNK = 2048


class DigitsNet(nn.Module):
    """Images (N, 1, 8, 8) in [-1, 1] → features (N, 64), standardised → logits (N, 10).

    Smooth throughout (SiLU, average pooling, and features taken before their nonlinearity), so that a small change of
    an image is a small change of its features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Dropout(dropout),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * 4 * 4, FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Linear(FEATURES, 10))
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def features(self, images: Tensor) -> Tensor:
        """(N, 64) standardised features of (N, 1, 8, 8) images in [-1, 1]; others are clamped, as when saved."""
        return (self.body(images.float().clamp(-1, 1)) - self.mean) / self.std

    def logits(self, images: Tensor) -> Tensor:
        """(N, 10) class logits."""
        return self.head(self.body(images.float().clamp(-1, 1)))

    forward = logits

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Set the mean and the deviation of the features to those of `images`."""
        raw = self.body(images.float().clamp(-1, 1))
        self.mean.copy_(raw.mean(0))
        self.std.copy_(raw.std(0).clamp_min(1e-6))


def load_features(path: str | Path) -> DigitsNet:
    """The network in a safetensors file, frozen, in evaluation mode."""
    network = DigitsNet()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(network: DigitsNet, images: Tensor) -> Tensor:
    """(N, 64) features of any number of images, chunk by chunk."""
    return torch.cat([network.features(chunk) for chunk in images.split(_CHUNK)])


@torch.no_grad()
def accuracy(network: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """The share of images that the classifier gives to their own label."""
    return (predictions(network, images) == labels).double().mean().item()


@torch.no_grad()
def predictions(network: DigitsNet, images: Tensor) -> Tensor:
    """(N,) the classes that the classifier gives to any number of images."""
    return torch.cat([network.logits(chunk).argmax(1) for chunk in images.split(_CHUNK)])


def confidence(images: Tensor, inputs: Sequence[int]) -> Tensor:
    """(N,) the classifier's log-probability of the class that was asked for, of images in [0, 1]: a metric to prefer by."""
    network = _shipped()
    labels = torch.tensor(list(inputs), device=images.device)
    return network.to(images.device).logits(images * 2 - 1).log_softmax(1)[torch.arange(len(labels)), labels]


@cache
def _shipped() -> DigitsNet:
    return load_features(resource("assets/digits-features.safetensors"))
