"""Samples of the teacher, made before training by its own sampler, each with the noise that it came from.

Regression onto such pairs anchors a student's modes (DMD: Yin et al. 2024, sec. 3.3), and the samples alone stand in for real
data (LADD: Sauer et al. 2024, sec. 3). They are kept like encoded prompts are (``cache.py``): shard by shard, with checksums, under
a name that hashes all they depend on; an interrupted making goes on where it was. Their noise has a fixed seed: runs that
differ in their own seed share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.cache import Cache, fingerprint
from distill.data.loader import Order, TrainingData
from distill.errors import UserError
from distill.methods.base import Pairs, PairsWanted
from distill.progress import track
from distill.teacher import Teacher

SEED = 0  #: of the noise, and of which input comes with which
SHARD = 64


class PairData:
    """The pairs of one process."""

    def __init__(self, data: TrainingData, entries: Tensor, read: Callable[[str, Tensor], Tensor], device: torch.device, seed: int) -> None:
        self._data, self._entries, self._read, self._device = data, entries, read, device
        self._order = Order(len(entries), seed)

    def __len__(self) -> int:
        return len(self._entries)

    def batch(self, index: int, size: int) -> Pairs:
        """The ``index``-th batch; each pair is seen once per epoch."""
        chosen = self._order.batch(index, size)
        told = self._data.told(self._entries[chosen])
        noise, x0 = (self._read(name, chosen).to(self._device) for name in ("noise", "x0"))
        return Pairs(noise, x0, told.condition, told.group, told.inputs)


def make_pairs(
    teacher: Teacher, data: TrainingData, wanted: PairsWanted, steps: int, folder: Path | None,
    batch_size: int = SHARD, seed: int = 0, process: tuple[int, int] = (0, 1),
) -> PairData:
    """The pairs that a method wants, from the cache or made now.

    Args:
        data: whose inputs the samples are conditioned on, each as often as it occurs there.
        steps: of the teacher's sampler, where the method has no wish.
        folder: of the cache; None: keep them in memory alone.
        batch_size: of the teacher.
        seed: of the order in which training sees them.
        process: (rank, number) of this process: each makes and sees its own part.

    Raises:
        UserError: if they are to be paired and the teacher's sampler draws noise of its own, or if a sample is not finite.
    """
    n_steps = wanted.steps or steps
    entries = Order(len(data), SEED).batch(0, wanted.count)
    shards = list(entries.split(SHARD))
    mine = [i for i in range(len(shards)) if i % process[1] == process[0] % min(process[1], len(shards))]
    numbers = torch.cat([torch.arange(wanted.count).split(SHARD)[i] for i in mine])
    chosen = entries[numbers]

    def make(indices: Sequence[int]) -> dict[str, Tensor]:
        parts = [_made(teacher, data, chosen[list(part)], numbers[list(part)], wanted, n_steps) for part in _parts(indices, batch_size)]
        return {"noise": torch.cat([noise for noise, _ in parts]), "x0": torch.cat([x0 for _, x0 in parts])}

    what = f"the teacher's samples, {n_steps} steps each"
    if folder is None:
        made = [make(range(i, min(i + SHARD, len(chosen)))) for i in track(range(0, len(chosen), SHARD), what)]
        whole = {name: torch.cat([m[name] for m in made]) for name in ("noise", "x0")}
        return PairData(data, chosen, lambda name, indices: whole[name][indices], teacher.device, seed)
    cache = Cache(folder / "pairs", _key(teacher, wanted, n_steps), SHARD)
    rows = cache.rows([f"{int(k)} {data.inputs[int(e)]}" for k, e in zip(numbers, chosen, strict=True)], make, track, what)
    return PairData(data, chosen, rows.read, teacher.device, seed)


def _made(teacher: Teacher, data: TrainingData, entries: Tensor, numbers: Tensor, wanted: PairsWanted, steps: int) -> tuple[Tensor, Tensor]:
    """(noise, x0) of some entries, on the CPU. A pair's noise is a function of its number."""
    draws = [torch.randn(teacher.sample_shape, generator=torch.Generator().manual_seed((SEED << 32) + int(k))) for k in numbers]
    noise = torch.stack(draws).to(teacher.device, teacher.denoiser.dtype)
    generator = torch.Generator().manual_seed(int(numbers[0]))
    before = generator.get_state()
    x0 = teacher.sample(data.told(entries).condition, noise, steps, wanted.guidance_scale, generator)
    if wanted.paired and not torch.equal(before, generator.get_state()):
        sampler = type(getattr(teacher.pipeline, "scheduler", None)).__name__
        raise UserError(
            f"regression onto pairs needs a sampler whose result is a function of its first noise, and {sampler} draws more at each step: "
            "save the pipeline with a deterministic scheduler (DDIMScheduler, DPMSolverMultistepScheduler)"
        )
    if not torch.isfinite(x0).all():
        raise UserError(f"the teacher's own {steps}-step samples are not finite: more teacher.steps, or another teacher.dtype")
    return noise.cpu(), x0.cpu()


def _parts(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _key(teacher: Teacher, wanted: PairsWanted, steps: int) -> str:
    """A hash of all that the samples depend on but their numbers and inputs."""
    scheduler: Any = getattr(teacher.pipeline, "scheduler", None)
    told = [
        type(teacher.pipeline).__name__, teacher.settings, str(teacher.denoiser.dtype), type(scheduler).__name__, dict(getattr(scheduler, "config", {})),
        steps, wanted.guidance_scale, SEED,
    ]
    networks = fingerprint([(teacher.backbone_name, teacher.backbone), *teacher.encoders()])
    return hashlib.sha256((json.dumps(told, sort_keys=True, default=str) + networks).encode()).hexdigest()
