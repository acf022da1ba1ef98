"""Images from a folder, with captions or class labels, checked before training starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distill.data.prompts import caption, read_rows, read_text
from distill.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def list_folder(folder: Path, conditioned_on: str | None, classes: int | None = None) -> tuple[list[Path], list[Any]]:
    """The images of a folder, hidden ones left out, and what each is conditioned on.

    Args:
        conditioned_on: "prompt" (captions: ``NAME.txt`` beside each image, or a ``captions.jsonl``/``metadata.jsonl`` with
            ``file_name`` or ``key`` and ``caption``/``text``), "class_labels" (sub-folders, sorted, are the classes; or
            numbers as their names), or None.

    Returns:
        N paths, sorted, and N captions, labels or Nones.

    Raises:
        UserError: if there are no images, or naming the image that has no caption or class.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not _hidden(p.relative_to(folder)))
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    inputs: list[Any] = [None] * len(paths)
    if conditioned_on == "prompt":
        inputs = _captions(folder, paths)
    elif conditioned_on == "class_labels":
        inputs = _labels(folder, paths, classes)
    return paths, inputs


def _hidden(path: Path) -> bool:
    """Whether it is one of an editor's or an operating system's own files, which would count as images or as a class."""
    return any(part.startswith(".") for part in path.parts)


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One image, upright, scaled to cover (height, width), centre-cropped: (channels, height, width) in [-1, 1].

    Raises:
        UserError: naming the file, if it is not a whole image.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            opened = ImageOps.exif_transpose(file)  # cameras store the picture lying and say so in its header
            if opened.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scaling
                opened = Image.fromarray((np.asarray(opened).clip(0, 65535) // 257).astype(np.uint8))
            if "A" in opened.getbands() or "transparency" in opened.info:  # transparent pixels become white, not black
                rgba = opened.convert("RGBA")
                opened = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = ImageOps.fit(opened.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable image ({error}): repair or remove it") from None
    array = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height, width, -1).permute(2, 0, 1)
    return array / 127.5 - 1


def _captions(folder: Path, paths: list[Path]) -> list[str]:
    listed = _listed_captions(folder)
    captions = []
    for path in paths:
        beside = path.with_suffix(".txt")
        text = listed.get(path.relative_to(folder).as_posix(), listed.get(path.stem))  # "" is a caption too
        if text is None and beside.is_file():
            text = read_text(beside).strip()
        if text is None:
            raise UserError(f"{path} has no caption: write it into {beside.name}, or list it in captions.jsonl")
        captions.append(text)
    return captions


def _listed_captions(folder: Path) -> dict[str, str]:
    listed: dict[str, str] = {}
    for name in ("captions.jsonl", "metadata.jsonl"):
        path = folder / name
        if not path.is_file():
            continue
        for where, row in read_rows(path):
            if "file_name" not in row and "key" not in row:
                raise UserError(f"{where}: has no file_name or key to say which image it is about")
            listed[str(row.get("file_name", row.get("key")))] = caption(row, where)
    return listed


def _labels(folder: Path, paths: list[Path], classes: int | None) -> list[int]:
    names = sorted({p.relative_to(folder).parts[0] for p in paths if p.parent != folder})
    if not names or any(p.parent == folder for p in paths):
        raise UserError(f"{folder}: a class-conditional teacher needs one sub-folder per class")
    numbers = [int(n) for n in names] if all(n.isdecimal() for n in names) else list(range(len(names)))
    if classes is not None and max(numbers) >= classes:
        raise UserError(f"{folder} has classes up to {max(numbers)}, but the teacher knows 0 to {classes - 1}")
    label = dict(zip(names, numbers, strict=True))
    return [label[p.relative_to(folder).parts[0]] for p in paths]
