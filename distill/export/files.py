"""Folders that appear whole or not at all, and the weights in them."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distill import __version__
from distill.errors import UserError
from distill.loading import FACTS
from distill.sampling import Sampler

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def writing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` if the block ends well, and vanishes if not.

    Raises:
        UserError: if the folder cannot be written, or it holds something that is not an export (or is one, and
            ``overwrite`` is not set).
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / FACTS).is_file():
            raise UserError(f"{folder} exists and is not an export of this tool: choose another folder")
        if not overwrite:
            raise UserError(f"{folder} exists already: choose another folder with --out, or remove it")
    temporary, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# -- what an export says of itself --------------------------------------------------------------------------------------


def write_facts(folder: Path, sampler: Sampler, **facts: Any) -> None:
    """``distill.json``: the sampler, and whatever else is to be known of the export."""
    everything = {"sampler": asdict(sampler), "distill": __version__, **facts}
    (folder / FACTS).write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself (distill.json), with its ``Sampler`` under "sampler"; None for any other folder.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["sampler"] = Sampler.from_json(facts["sampler"])
        return dict(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): export the student again") from None


def set_attributes(pipeline: Any, facts: Mapping[str, Any]) -> None:
    """Set on a loaded pipeline what was set on the teacher's after its construction, and is not saved by diffusers.

    Raises:
        UserError: if the facts are damaged.
    """
    try:
        values = {str(name): ast.literal_eval(value) for name, value in (facts.get("attributes") or {}).items()}
    except (ValueError, SyntaxError, AttributeError, TypeError) as error:
        raise UserError(f"{FACTS} is damaged ({error}): export the student again") from None
    for name, value in values.items():
        if name.isidentifier() and not name.startswith("_") and name in vars(pipeline):
            setattr(pipeline, name, value)


# -- weights ------------------------------------------------------------------------------------------------------------


def check_shard_size(size: str | None) -> None:
    """
    Raises:
        UserError: if it is no size such as 5GB.
    """
    if size is not None and not re.fullmatch(r"[1-9]\d*(KB|MB|GB|KIB|MIB|GIB)", size.upper()):
        raise UserError(f"--max-shard-size {size} is no size: write it as 5GB or 900MB")


def to_variant(folder: Path, variant: str) -> None:
    """Rewrite the weights of a folder that was saved under a variant's file names in that variant's precision, file by
    file: the networks themselves stay as they are.

    Raises:
        UserError: if a weight does not fit into it.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    dtype = VARIANTS[variant]
    sizes: dict[Path, int] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(str(path), "pt") as stored:
            metadata = stored.metadata()
            weights = {name: stored.get_tensor(name) for name in stored.keys()}
        for name, value in weights.items():
            if value.is_floating_point():
                weights[name] = value.to(dtype)
                if not torch.isfinite(weights[name]).all() and torch.isfinite(value).all():
                    raise UserError(f"{path.parent.name}: {name} is too large for {variant}: use --variant bf16, or leave out --variant")
        save_file(weights, path, metadata=metadata)
        sizes[path.parent] = sizes.get(path.parent, 0) + sum(v.numel() * v.element_size() for v in weights.values())
    for index in folder.rglob(f"*.index.{variant}.json"):
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = sizes[index.parent]
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
