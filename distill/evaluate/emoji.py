"""The emoji metrics: a small network of image and caption embeddings that stands in for Inception and CLIP.

    fd-emoji     Fréchet distance of the image embeddings (before normalisation) to those of the real training images
    emoji-clip   mean cosine of each image's embedding and its caption's

Two towers are trained to bring an image and its caption together and to keep them from the other pairs of the batch
(Radford et al. 2021, arXiv 2103.00020); tools/train_emoji_features.py does it, on the real training images. Captions are
bags of words. The file carries the moments of the real training and held-out images, since the images do not ship.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.checkpoint import sha256
from distill.errors import UserError
from distill.evaluate.frechet import Gaussian, frechet_distance
from distill.evaluate.generate import Images
from distill.resources import resource

EMBEDDING = 64  #: width of the embeddings
BUCKETS = 8192  #: words are told apart by their CRC-32 modulo this
SIZE = (3, 64, 64)
FILE = "assets/emoji-features.safetensors"
MOMENTS = ("train_mean", "train_covariance", "heldout_mean", "heldout_covariance")

_CHUNK = 256
_WORD = re.compile("[a-z]+|[0-9]+")


def word_ids(caption: str) -> list[int]:
    """The buckets of a caption's words; bucket 0 for a caption without any."""
    return [1 + zlib.crc32(word.encode()) % (BUCKETS - 1) for word in _WORD.findall(caption.lower())] or [0]


class EmojiNet(nn.Module):
    """Images (N, 3, 64, 64) in [0, 1] → (N, 64), and captions → (N, 64)."""

    train_mean: Tensor
    train_covariance: Tensor
    heldout_mean: Tensor
    heldout_covariance: Tensor

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 4, stride=2, padding=1)]
        for a, b in ((32, 64), (64, 96), (96, 128)):
            layers += [nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1), nn.AvgPool2d(2)]
        layers += [nn.GroupNorm(8, 128), nn.SiLU()]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(128 * 4 * 4, EMBEDDING))
        self.words = nn.EmbeddingBag(BUCKETS, 128, mode="mean")
        self.text = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Dropout(dropout), nn.Linear(256, EMBEDDING))
        self.log_scale = nn.Parameter(torch.tensor(2.3))  #: of the cosines in training
        for name in MOMENTS:
            self.register_buffer(name, torch.zeros(EMBEDDING) if name.endswith("mean") else torch.eye(EMBEDDING))

    def embed_images(self, images: Tensor) -> Tensor:
        """(N, 64) embeddings, not normalised; values outside [0, 1] are clamped, as when saved."""
        return self.image(images.float().clamp(0, 1) * 2 - 1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """(N, 64) embeddings, not normalised."""
        ids = [word_ids(caption) for caption in captions]
        starts = torch.tensor([0] + [len(x) for x in ids[:-1]]).cumsum(0)
        device = self.words.weight.device
        return self.text(self.words(torch.tensor(sum(ids, []), device=device), starts.to(device)))


def load_features(path: str | Path) -> EmojiNet:
    """The network in a safetensors file (stored in half precision), frozen, in evaluation mode."""
    network = EmojiNet()
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(network: EmojiNet, images: Tensor) -> Tensor:
    """(N, 64) embeddings of any number of images in [0, 1], chunk by chunk."""
    return torch.cat([network.embed_images(chunk) for chunk in images.split(_CHUNK)])


@torch.no_grad()
def cosines(network: EmojiNet, images: Tensor, captions: Sequence[str]) -> Tensor:
    """(N, M) cosines of N images and M captions."""
    return F.normalize(features(network, images), dim=1) @ F.normalize(network.embed_captions(captions), dim=1).T


@cache
def _network() -> EmojiNet:
    return load_features(resource(FILE))


def _check(images: Images, least: int) -> None:
    if len(images.images) < least:
        raise UserError(f"{len(images.images)} samples are too few to measure: at least {least}")
    if images.images.shape[1:] != SIZE:
        size = "×".join(map(str, images.images.shape[1:]))
        raise UserError(f"the emoji metrics measure 3×64×64 images, and these are {size}: use fid or clip-score")


def fd_emoji(images: Images, context: object) -> dict[str, float | int | str]:
    """Fréchet distances to the real training and held-out emoji."""
    _check(images, 2)
    network = _network()
    made = features(network, images.images)
    return {
        "fd_emoji": frechet_distance(made, Gaussian(network.train_mean.double(), network.train_covariance.double())),
        "fd_emoji_heldout": frechet_distance(made, Gaussian(network.heldout_mean.double(), network.heldout_covariance.double())),
        "fd_emoji_features_sha256": sha256(resource(FILE)),
    }


def emoji_clip(images: Images, context: object) -> dict[str, float | int | str]:
    """Mean cosine of each image and its caption in the emoji network."""
    _check(images, 1)
    if any(not isinstance(text, str) for text in images.inputs):
        raise UserError("emoji-clip compares images with their prompts, and this pipeline takes no prompts")
    return {"emoji_clip": cosines(_network(), images.images, images.inputs).diagonal().mean().item()}
