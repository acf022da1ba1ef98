"""The emoji data set: captions of 3,781 Noto Emoji and the latents that the emoji teacher's autoencoder gives their images.

The split is by base emoji (skin tones, genders and directions of one emoji are on one side), and each word of a held-out
caption is in the captions of at least three training bases; tools/emoji_data.py makes it. What ships are the captions
and the latents (means of the autoencoder's posterior, times its scaling factor), not the images.

Source: Google Noto Emoji (Apache License 2.0; country flags are public domain), captions from Unicode character names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.resources import resource

Split = Literal["train", "heldout", "all"]

SHAPE = (12, 8, 8)  #: channels, height, width of the latents
_PARTS: dict[str, tuple[str, ...]] = {"train": ("train",), "heldout": ("heldout",), "all": ("train", "heldout")}


def load_emoji_rows(split: Split = "train") -> list[dict[str, str]]:
    """The captions of one part: dictionaries of key, caption, short (another, shorter name), category, code and base.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in _PARTS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(_PARTS)}")
    files = [resource(f"assets/emoji/{part}.jsonl") for part in _PARTS[split]]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def load_emoji(split: Split = "train") -> tuple[Tensor, list[str]]:
    """Latents and captions of one part of the emoji.

    Args:
        split: "train", "heldout" (never seen in training) or "all".

    Returns:
        latents of shape (N, 12, 8, 8), float32, in the teacher's scale (standard deviation 1), and N captions.

    Raises:
        ValueError: for an unknown split.
    """
    captions = [row["caption"] for row in load_emoji_rows(split)]
    latents = load_file(resource("assets/emoji/latents.safetensors"))
    return torch.cat([latents[part] for part in _PARTS[split]]).float(), captions


def balance(rows: Sequence[Mapping[str, str]]) -> Tensor:
    """(N,) sampling weights, 1/√(variants of the base): 104 couples holding hands are not 104 dogs."""
    size = Counter(row["base"] for row in rows)
    return torch.tensor([size[row["base"]] ** -0.5 for row in rows])
