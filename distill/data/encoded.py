"""The conditions and latents that training draws from: encoded once, kept in memory or in the cache on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.checkpoint import sha256
from distill.data.cache import SHARD, Cache, Shards, fingerprint
from distill.data.images import read_image
from distill.denoiser import Condition, cat
from distill.progress import track
from distill.teacher import Teacher

ENCODE_BATCH = 16


class Conditions(Protocol):
    """One condition per input."""

    def take(self, indices: Tensor) -> Condition:
        """Those of some inputs, on the CPU or on the teacher's device."""


class InMemory:
    """All of them, as the teacher encodes them."""

    def __init__(self, teacher: Teacher, inputs: Sequence[Any]) -> None:
        starts = range(0, len(inputs), ENCODE_BATCH)
        parts = [teacher.condition(inputs[i : i + ENCODE_BATCH]) for i in track(starts, "encoding conditions")]
        self._all = cat(parts) if parts[0].values else parts[0]

    def take(self, indices: Tensor) -> Condition:
        return self._all[indices.to(self._device)] if self._all.values else self._all

    @property
    def _device(self) -> torch.device:
        return next((v.device for v in self._all.values.values() if isinstance(v, Tensor)), torch.device("cpu"))


class OnDisk:
    """All of them in the cache."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._has_null = any(n.startswith("null/") for n in shards.names)

    def take(self, indices: Tensor) -> Condition:
        def read(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): self._shards.read(n, indices) for n in self._shards.names if n.startswith(prefix)}

        return Condition(read("values/"), read("null/") if self._has_null else None)


def encode_conditions(teacher: Teacher, inputs: Sequence[Any], cache_folder: Path | None) -> Conditions:
    """The conditions of prompts, classes or Nones; prompts go through the cache, if there is one.

    Conditions that are not tensors of one shape stay in memory: prompts of different lengths for a backbone without a mask.
    """
    if cache_folder is None or teacher.input_name != "prompt":
        return InMemory(teacher, inputs)
    def encode(indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = [inputs[i] for i in indices]
        whole = cat([teacher.condition(chosen[i : i + ENCODE_BATCH]) for i in range(0, len(chosen), ENCODE_BATCH)])
        named = {f"values/{k}": v for k, v in whole.values.items()} | {f"null/{k}": v for k, v in (whole.null or {}).items()}
        tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
        if len(tensors) < len(named):
            raise _Ragged
        return tensors

    try:
        shards = Cache(cache_folder / "conditions", _key(teacher, "conditions")).rows([str(i) for i in inputs], encode, track, "encoding prompts")
    except _Ragged:
        return InMemory(teacher, inputs)
    return OnDisk(shards) if shards.is_uniform() else InMemory(teacher, inputs)


def encode_images(teacher: Teacher, paths: Sequence[Path], cache_folder: Path | None) -> Tensor:
    """x0 of every image file. They are read as they are encoded: only latents are kept, not the (much larger) images.

    Latents go through the cache, if there is one; pixels need no encoding.
    """

    def encode(indices: Sequence[int]) -> Tensor:
        parts = []
        for i in range(0, len(indices), ENCODE_BATCH):
            images = torch.stack([read_image(paths[j], teacher.image_shape) for j in indices[i : i + ENCODE_BATCH]])
            parts.append(teacher.encode(images.to(teacher.device)).to(teacher.denoiser.dtype))
        return torch.cat(parts)

    if cache_folder is None or teacher.autoencoder is None:
        return torch.cat([encode(range(i, min(i + SHARD, len(paths)))) for i in track(range(0, len(paths), SHARD), "reading images")])
    cache = Cache(cache_folder / "latents", _key(teacher, "latents"))
    shards = cache.rows([sha256(p) for p in track(paths, "reading images")], lambda chosen: {"x0": encode(chosen)}, track, "encoding images")
    return shards.read("x0", torch.arange(len(paths))).to(teacher.device)


def _key(teacher: Teacher, what: str) -> str:
    """A hash of what encodes: the pipeline's other networks, and the settings of its call."""
    settings = json.dumps([what, type(teacher.pipeline).__name__, teacher.settings, str(teacher.denoiser.dtype)], sort_keys=True, default=str)
    return hashlib.sha256((settings + fingerprint(teacher.encoders())).encode()).hexdigest()


class _Ragged(Exception):
    """These conditions are not tensors of one shape."""
