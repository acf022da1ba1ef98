"""Distances of images as networks see them, loaded only where a recipe asks for one: LPIPS between two images, CLIP between an image
and its prompt."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import UserError


def lpips(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) with the VGG network: images (batch, channels, h, w) in [0, 1] → (batch,).

    Raises:
        UserError: if the network cannot be had.
    """
    network = _lpips(a.device)
    a, b = ((2 * x - 1).expand(-1, 3, -1, -1) for x in (a, b))
    if min(a.shape[2:]) < 32:  # five halvings
        a, b = (F.interpolate(x, scale_factor=32 / min(x.shape[2:]), mode="bilinear", align_corners=False) for x in (a, b))
    return network(a, b).flatten()


@cache
def _lpips(device: torch.device) -> Any:
    try:
        return importlib.import_module("lpips").LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:  # a missing package, or errors of the network and the hub
        reason = type(error).__name__
        raise UserError(f"metric lpips needs the package lpips and its VGG weights, which could not be loaded here ({reason}): pip install lpips") from None


def clip_similarity(images: Tensor, texts: Sequence[Any], model: str, pretrained: str) -> Tensor:
    """Cosine of OpenCLIP's image and text embeddings, differentiable in the images: (batch, channels, h, w) in [0, 1] → (batch,).

    Args:
        model: name of an OpenCLIP architecture; pretrained: a tag of its weights, or the path of a safetensors file.

    Raises:
        UserError: if the texts are no prompts, or the weights can be neither found nor downloaded.
    """
    if any(not isinstance(text, str) for text in texts):
        raise UserError("term clip compares images with their prompts, and this teacher takes no prompts")
    network, tokenizer = _clip(model, pretrained, images.device)
    size = network.visual.image_size
    side = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = (torch.tensor(v, device=images.device).reshape(1, 3, 1, 1) for v in (network.visual.image_mean, network.visual.image_std))
    pixels = F.interpolate(images.float().expand(-1, 3, -1, -1), size=side, mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        told = network.encode_text(tokenizer(list(texts)).to(images.device))
    return F.cosine_similarity(network.encode_image((pixels - mean) / std), told, dim=1)


@cache
def _clip(model: str, pretrained: str, device: torch.device) -> tuple[Any, Any]:
    import open_clip

    try:
        network = open_clip.create_model(model, pretrained=pretrained, device=device)
        return network.eval().requires_grad_(False), open_clip.get_tokenizer(model)
    except Exception as error:  # hub, network and cache errors of three libraries
        reason = type(error).__name__
        raise UserError(f"term clip needs {model} of {pretrained}, which could not be loaded or downloaded from here ({reason}): go online once") from None
