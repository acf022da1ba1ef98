"""Checkpoints that a kill at any moment cannot spoil: safetensors and a manifest with checksums, written aside and renamed.

A checkpoint is a folder ``step-00001200`` under ``checkpoints/``. It appears by one rename, after every byte of it is on
disk; a half-written one has another name and is removed at the next write. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import UserError

_PREFIX, _TEMPORARY, _DOOMED = "step-", ".writing-", ".removing-"
_WEIGHTS, _MANIFEST = "state.safetensors", "manifest.json"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint after ``step`` steps and drop all but the newest ``keep``.

    Args:
        facts: JSON data beside the tensors.

    Raises:
        UserError: if the disk refuses (full, read-only); earlier checkpoints stay as they are.
    """
    final, temporary = folder / f"{_PREFIX}{step:08d}", folder / f"{_TEMPORARY}{step:08d}"
    if final.exists():  # a resumed run that is stopped at once: what is there was verified when it was loaded
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        temporary.mkdir()
        contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(contiguous, temporary / _WEIGHTS)
        manifest = {"step": step, "sha256": {_WEIGHTS: sha256(temporary / _WEIGHTS)}, "facts": dict(facts)}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (temporary / _WEIGHTS, temporary / _MANIFEST, temporary):
            _sync(path)
        os.replace(temporary, final)
        _sync(folder)
        for old in steps(folder)[:-keep]:
            _remove(folder / f"{_PREFIX}{old:08d}")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{final} could not be written: {error}; earlier checkpoints are untouched") from None
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that exist, ascending."""
    if not folder.is_dir():
        return []
    names = (p.name.removeprefix(_PREFIX) for p in folder.iterdir() if p.name.startswith(_PREFIX))
    return sorted(int(name) for name in names if name.isdigit())


def load(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a checkpoint, verified.

    Raises:
        UserError: if a file is missing or altered.
    """
    path = folder / f"{_PREFIX}{step:08d}"
    advice = f"delete the folder to resume from the checkpoint before it ({_previous(folder, step)})"
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        digest, facts = manifest["sha256"][_WEIGHTS], manifest["facts"]
        if sha256(path / _WEIGHTS) != digest:
            raise UserError(f"{path} is corrupt: {_WEIGHTS} is not what was written; {advice}")
        return load_file(path / _WEIGHTS), facts
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is corrupt ({type(error).__name__}: {error}); {advice}") from None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _previous(folder: Path, step: int) -> str:
    earlier = [s for s in steps(folder) if s < step]
    return f"step {earlier[-1]}" if earlier else "none is left: the run starts anew"


def _clean(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.startswith((_TEMPORARY, _DOOMED)):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Rename, then delete: a kill between leaves no half-deleted checkpoint under its own name."""
    doomed = path.with_name(_DOOMED + path.name)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- optimizer state as tensors -----------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The per-parameter state of an optimizer, ``prefix.<parameter index>.<name>``."""
    state = optimizer.state_dict()["state"]
    found: dict[str, Tensor] = {}
    for index, values in state.items():
        for name, value in values.items():
            # bitsandbytes keeps what is quantised in a dictionary inside, with tables that all parameters share.
            inner = {k: v.clone() for k, v in value.items()} if isinstance(value, dict) else {name: value}
            found |= {f"{prefix}.{index}.{k}": torch.as_tensor(v) for k, v in inner.items() if v is not None}
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """The inverse of ``optimizer_tensors``; learning rates are a function of the step and not stored."""
    current = optimizer.state_dict()
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            index, name = key[len(prefix) + 1 :].split(".", 1)
            # bitsandbytes counts its steps in a Python integer, and its kernels take nothing else.
            counter = value.dim() == 0 and value.dtype == torch.int64
            state.setdefault(int(index), {})[name] = int(value) if counter else value
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
