"""The data of a run as tensors on the teacher's device: latents encoded once, conditions encoded once, order by step.

``batch(index, size)`` is a function of (seed, index) alone, so that a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.config import Data
from distill.data.cache import default_folder
from distill.data.digits import load_digits
from distill.data.emoji import SHAPE, balance, load_emoji, load_emoji_rows
from distill.data.encoded import encode_conditions, encode_images
from distill.data.images import list_folder
from distill.data.prompts import read_prompts
from distill.denoiser import Condition
from distill.errors import UserError
from distill.teacher import Teacher


class Drawn(NamedTuple):
    """One batch of the data."""

    x0: Tensor | None
    condition: Condition
    group: Tensor  #: (batch,) which of the different inputs
    inputs: list[Any]


class Order:
    """Which of ``count`` entries come when: each once per epoch, in an order of the epoch's own; or, with weights (count,), drawn
    with replacement in proportion to them."""

    def __init__(self, count: int, seed: int, weights: Tensor | None = None) -> None:
        self.count, self.seed, self.weights = count, seed, weights
        self._epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, index: int, size: int) -> Tensor:
        """(size,) the entries of the ``index``-th batch."""
        positions = range(index * size, (index + 1) * size)
        return torch.stack([self._drawn(p // self.count)[p % self.count] for p in positions])

    def _drawn(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            if self.weights is None:
                self._epoch = (epoch, torch.randperm(self.count, generator=generator))
            else:
                self._epoch = (epoch, torch.multinomial(self.weights, self.count, True, generator=generator))
        return self._epoch[1]


class TrainingData:
    """Samples and what they are conditioned on.

    Args:
        x0: (N, ...) real samples in the teacher's space, or None.
        inputs: one prompt, class label or None per sample; without x0, the pool that is drawn from.
        weights: (N,) how often each is drawn, with replacement; without them each is drawn once an epoch.
    """

    def __init__(
        self, teacher: Teacher, x0: Tensor | None, inputs: Sequence[Any], seed: int, cache_folder: Path | None = None, weights: Tensor | None = None
    ) -> None:
        self.x0, self.inputs, self.seed = x0, list(inputs), seed
        unique = list(dict.fromkeys(self.inputs))
        position = {value: i for i, value in enumerate(unique)}
        self._index = torch.tensor([position[value] for value in self.inputs])
        self._conditions, self._device = encode_conditions(teacher, unique, cache_folder), teacher.device
        self._order = Order(len(self.inputs), seed, weights)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, index: int, size: int) -> Drawn:
        """The ``index``-th batch. The order is another in every epoch."""
        chosen = self._order.batch(index, size)
        x0 = None if self.x0 is None else self.x0[chosen.to(self.x0.device)]
        return self.told(chosen)._replace(x0=x0)

    def told(self, chosen: Tensor) -> Drawn:
        """What some entries are conditioned on, without their samples."""
        group = self._index[chosen]
        return Drawn(None, self._conditions.take(group).to(self._device), group.to(self._device), [self.inputs[int(i)] for i in chosen])

    def examples(self, count: int) -> list[Any]:
        """The first few different inputs."""
        return list(dict.fromkeys(self.inputs))[:count]


def load_data(section: Data, teacher: Teacher, needs_images: bool, seed: int = 0) -> TrainingData:
    """The recipe's data for a teacher.

    Raises:
        UserError: if files are missing or broken, or do not fit the teacher.
    """
    folder = cache_folder(section)
    if section.source == "digits":
        if teacher.sample_shape != (1, 8, 8):
            raise UserError(f"data.source digits has 8×8 grey images; the teacher's samples are {'×'.join(map(str, teacher.sample_shape))}")
        images, labels = load_digits(section.split)
        inputs: list[Any] = labels.tolist() if teacher.input_name == "class_labels" else [None] * len(images)
        return TrainingData(teacher, images.to(teacher.device), inputs, seed)
    if section.source == "emoji":
        if teacher.sample_shape != SHAPE or teacher.input_name != "prompt":
            raise UserError("data.source emoji has latents and captions for assets/emoji-teacher: use that teacher, or source images or prompts")
        latents, captions = load_emoji(section.split)
        weights = balance(load_emoji_rows(section.split))
        return TrainingData(teacher, latents.to(teacher.device), captions, seed, folder, weights)
    if section.source == "images":
        assert section.path is not None
        paths, inputs = list_folder(section.path.expanduser(), teacher.input_name, teacher.classes)
        return TrainingData(teacher, encode_images(teacher, paths, folder) if needs_images else None, inputs, seed, folder)
    if section.source == "prompts":
        if teacher.input_name != "prompt":
            raise UserError("data.source prompts needs a text-conditional teacher; this one takes no prompts")
        assert section.path is not None
        return TrainingData(teacher, None, read_prompts(section.path.expanduser()), seed, folder)
    if teacher.input_name == "prompt":
        raise UserError("data.source: a text-conditional teacher needs prompts: set source: prompts and path, or source: images")
    classes = teacher.classes
    return TrainingData(teacher, None, list(range(classes)) if classes else [None], seed)


def cache_folder(section: Data) -> Path | None:
    """Where what is made once is kept; None: nowhere."""
    return (section.cache_folder or default_folder()).expanduser() if section.cache else None
