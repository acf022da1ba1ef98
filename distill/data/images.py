"""Images from a folder, with captions or class labels, checked before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distill.errors import UserError
from distill.progress import track

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def read_folder(
    folder: Path, shape: tuple[int, int, int], conditioned_on: str | None, classes: int | None = None,
) -> tuple[Tensor, list[Any]]:
    """All images of a folder and what they are conditioned on.

    Args:
        shape: (channels, height, width) that the teacher's images have; each image is scaled to cover it and cropped.
        conditioned_on: "prompt" (captions: ``NAME.txt`` beside each image, or a ``captions.jsonl``/``metadata.jsonl`` with
            ``file_name`` or ``key`` and ``caption``/``text``), "class_labels" (sub-folders, sorted, are the classes; or
            numbers as their names), or None.

    Returns:
        (N, channels, height, width) in [-1, 1], and N captions, labels or Nones.

    Raises:
        UserError: naming the file that is broken, or the image that has no caption.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    inputs: list[Any] = [None] * len(paths)
    if conditioned_on == "prompt":
        inputs = _captions(folder, paths)
    elif conditioned_on == "class_labels":
        inputs = _labels(folder, paths, classes)
    return torch.stack([read_image(path, shape) for path in track(paths, "reading images")]), inputs


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One image, scaled to cover (height, width), centre-cropped: (channels, height, width) in [-1, 1]."""
    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            if "A" in opened.getbands() or "transparency" in opened.info:  # transparent pixels become white, not black
                rgba = opened.convert("RGBA")
                opened = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = ImageOps.fit(opened.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable image ({error}): repair or remove it") from None
    array = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height, width, -1).permute(2, 0, 1)
    return array / 127.5 - 1


def _captions(folder: Path, paths: list[Path]) -> list[str]:
    listed = _listed_captions(folder)
    captions = []
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = listed.get(path.relative_to(folder).as_posix()) or listed.get(path.stem)
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8").strip()
        if caption is None:
            raise UserError(f"{path} has no caption: write it into {beside.name}, or list it in captions.jsonl")
        captions.append(caption)
    return captions


def _listed_captions(folder: Path) -> dict[str, str]:
    listed: dict[str, str] = {}
    for name in ("captions.jsonl", "metadata.jsonl"):
        path = folder / name
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                key = str(row.get("file_name", row.get("key")))
                listed[key] = str(row[next(k for k in ("caption", "text", "prompt") if k in row)])
            except (ValueError, AttributeError, StopIteration):
                raise UserError(f"{path}:{number}: should be JSON with file_name (or key) and caption") from None
    return listed


def _labels(folder: Path, paths: list[Path], classes: int | None) -> list[int]:
    names = sorted({p.relative_to(folder).parts[0] for p in paths if p.parent != folder})
    if not names or any(p.parent == folder for p in paths):
        raise UserError(f"{folder}: a class-conditional teacher needs one sub-folder per class")
    numbers = [int(n) for n in names] if all(n.isdigit() for n in names) else list(range(len(names)))
    if classes is not None and max(numbers) >= classes:
        raise UserError(f"{folder} has classes up to {max(numbers)}, but the teacher knows 0 to {classes - 1}")
    label = dict(zip(names, numbers, strict=True))
    return [label[p.relative_to(folder).parts[0]] for p in paths]
