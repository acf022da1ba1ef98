"""The data of a run as tensors on the teacher's device: latents encoded once, conditions encoded once, order by step.

``batch(index, size)`` is a function of (seed, index) alone, so that a resumed run sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        self.x0, self.inputs, self.seed, self._weights = x0, list(inputs), seed, weights
        unique = list(dict.fromkeys(self.inputs))
        position = {value: i for i, value in enumerate(unique)}
        self._index = torch.tensor([position[value] for value in self.inputs])
        self._conditions, self._device = encode_conditions(teacher, unique, cache_folder), teacher.device
        self._epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, index: int, size: int) -> tuple[Tensor | None, Condition]:
        """The ``index``-th batch: (x0 or None, condition). The order is another in every epoch."""
        positions = torch.arange(index * size, (index + 1) * size)
        chosen = torch.stack([self._order(int(p) // len(self))[int(p) % len(self)] for p in positions])
        x0 = None if self.x0 is None else self.x0[chosen.to(self.x0.device)]
        return x0, self._conditions.take(self._index[chosen]).to(self._device)

    def _order(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            count = len(self)
            drawn = torch.randperm(count, generator=generator) if self._weights is None else torch.multinomial(self._weights, count, True, generator=generator)
            self._epoch = (epoch, drawn)
        return self._epoch[1]

    def examples(self, count: int) -> list[Any]:
        """The first few different inputs."""
        return list(dict.fromkeys(self.inputs))[:count]


def load_data(section: Data, teacher: Teacher, needs_images: bool, seed: int = 0) -> TrainingData:
    """The recipe's data for a teacher.

    Raises:
        UserError: if files are missing or broken, or do not fit the teacher.
    """
    folder = (section.cache_folder or default_folder()).expanduser() if section.cache else None
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
