"""The digits data set: the 1,797 real 8×8 scans of handwritten digits that scikit-learn carries.

Grey levels 0…16 are scaled to [-1, 1]. The split is stratified and fixed: in each class, the fifth of the images with
the smallest keys is held out, the keys being Python's own ``random.Random(seed).random()``, whose sequence for a given
seed is guaranteed from version to version (that of a library's shuffle is not).

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(CC BY 4.0).
"""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "heldout", "all"]

CLASSES = 10
NULL_CLASS = 10  #: the class id that stands for "no class" in the digits teacher
SHAPE = (1, 8, 8)  #: channels, height, width

_SPLIT_SEED = 0
_HELD_OUT_PART = 5  # one image in five


def load_digits(split: Split = "train") -> tuple[Tensor, Tensor]:
    """Images and labels of one part of the digits.

    Args:
        split: "train" (1,438 images), "heldout" (359 images, never seen in training) or "all".

    Returns:
        images of shape (N, 1, 8, 8), float32 in [-1, 1], and labels of shape (N,), int64 in 0…9; in the original order.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"unknown split {split!r}; known: train, heldout, all")
    from sklearn import datasets  # imported here: slow to load, and needed for this data set only

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    if split == "all":
        return images, labels
    heldout = torch.zeros(len(labels), dtype=torch.bool)
    heldout[held_out_indices(labels.tolist())] = True
    chosen = heldout if split == "heldout" else ~heldout
    return images[chosen], labels[chosen]


def held_out_indices(labels: list[int]) -> list[int]:
    """The sorted indices of the held-out images: a fifth of each class (rounded), the same on every machine."""
    source = random.Random(_SPLIT_SEED)
    keys = [source.random() for _ in labels]
    held_out: list[int] = []
    for label in sorted(set(labels)):
        members = sorted((i for i, value in enumerate(labels) if value == label), key=keys.__getitem__)
        held_out += members[: round(len(members) / _HELD_OUT_PART)]
    return sorted(held_out)
