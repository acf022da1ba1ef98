"""What encoders made, on disk: prompts and images are encoded once per encoder, not once per run.

A shard is a safetensors file with a few hundred entries beside a JSON file that holds its checksum. Its name is a hash of
the encoders (``fingerprint``), the settings of the pipeline's call and the inputs: whatever changes one of them asks for
another file. Shards are written one by one and renamed into place, so that an interrupted encoding goes on where it was;
a damaged one is found by its checksum, named, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.checkpoint import sha256
from distill.errors import UserError

SHARD = 256  #: entries


def default_folder() -> Path:
    """``$DISTILL_CACHE``, or ``distill`` in the user's cache folder."""
    given = os.environ.get("DISTILL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "distill"


def fingerprint(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """A hash of networks: names, shapes and types of all parameters but adapters', and a sample of the values of each."""
    digest = hashlib.sha256()
    for name, module in modules:
        for key, value in module.state_dict().items():
            if "lora_" in key:
                continue
            key = key.replace(".base_layer.", ".")
            digest.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
            if isinstance(value, Tensor) and value.numel() and value.device.type != "meta":
                flat = value.flatten()
                digest.update(flat[:: max(1, flat.numel() // 64)][:65].double().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Cache:
    """A folder of shards.

    Args:
        key: of everything that the entries depend on beside the inputs.
    """

    folder: Path
    key: str
    size: int | None = None  #: entries of a shard: what an interrupted run loses at most

    def rows(
        self, inputs: Sequence[str], encode: Callable[[Sequence[int]], dict[str, Tensor]], progress: Callable[[Sequence[int], str], Iterable[int]], what: str,
    ) -> Shards:
        """The encoded inputs; those that are not on disk are encoded now.

        Args:
            inputs: what identifies each entry: a prompt, a file's checksum.
            encode: indices of inputs → tensors by name, (count, ...) each.
        """
        size = self.size or SHARD
        starts = range(0, len(inputs), size)
        paths = [self._path(inputs[i : i + size]) for i in starts]
        missing = [i for i, path in zip(starts, paths, strict=True) if not self._is_whole(path)]
        for i in progress(missing, what) if missing else ():
            self._write(paths[i // size], encode(range(i, min(i + size, len(inputs)))))
        return Shards(paths, [len(inputs[i : i + size]) for i in starts])

    def _path(self, inputs: Sequence[str]) -> Path:
        digest = hashlib.sha256(json.dumps([self.key, *inputs]).encode()).hexdigest()[:32]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _is_whole(self, path: Path) -> bool:
        """Whether a shard is there and undamaged; a damaged one is named on stderr."""
        note = path.with_suffix(".json")
        if not path.is_file() or not note.is_file():
            return False
        try:
            if json.loads(note.read_text(encoding="utf-8"))["sha256"] == sha256(path):
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        print(f"distill: the cached shard {path} is damaged: making its entries again", file=sys.stderr)
        return False

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
            note = path.with_suffix(f".{os.getpid()}.json.tmp")
            note.write_text(json.dumps({"sha256": sha256(temporary)}) + "\n", encoding="utf-8")
            temporary.replace(path)
            note.replace(path.with_suffix(".json"))
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise UserError(f"the cache {self.folder} cannot be written ({error}): set data.cache_folder, or data.cache: false") from None


class Shards:
    """Encoded entries on disk, read through the operating system's page cache: memory holds what is in use."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self._files: list[Any] = [safe_open(path, "pt") for path in paths]
        self._ends = torch.tensor(counts).cumsum(0)
        self.names = sorted(self._files[0].keys()) if paths else []

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def is_uniform(self) -> bool:
        """Whether the entries of all shards have the same names and shapes."""
        return len({tuple((n, *f.get_slice(n).get_shape()[1:]) for n in sorted(f.keys())) for f in self._files}) <= 1

    def read(self, name: str, indices: Tensor) -> Tensor:
        """Entries of one tensor, (len(indices), ...)."""
        return torch.stack([self._row(name, i) for i in indices.tolist()])

    def _row(self, name: str, i: int) -> Tensor:
        shard = int(torch.searchsorted(self._ends, i, right=True))
        start = int(self._ends[shard - 1]) if shard else 0
        row: Tensor = self._files[shard].get_slice(name)[i - start]
        return row
