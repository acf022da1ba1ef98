"""Pictures for people: teacher and student side by side, from equal noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, GAP, LINE = 12, 3, 22


def comparison_grid(rows: Sequence[tuple[str, Tensor]], columns: int, cell: int = 56) -> Image.Image:
    """A picture with a caption over each block of images.

    Args:
        rows: (caption, images) with images (N, channels, height, width) in [0, 1]; column i of each block shows what was
            made from the same noise and input.
        cell: least size of an image on the picture; small ones are enlarged by a whole factor, without blurring.
    """
    blocks = [(caption, [_tile(image, cell) for image in images]) for caption, images in rows]
    side_x, side_y = blocks[0][1][0].size
    width = 2 * MARGIN + columns * (side_x + GAP) - GAP
    lines = [-(-len(tiles) // columns) for _, tiles in blocks]
    height = 2 * MARGIN + sum(LINE + n * (side_y + GAP) + MARGIN for n in lines) - MARGIN
    picture = Image.new("RGB", (width, height), "white")
    draw, font, top = ImageDraw.Draw(picture), ImageFont.load_default(14), MARGIN
    for (caption, tiles), count in zip(blocks, lines, strict=True):
        draw.text((MARGIN, top), caption, fill="#222", font=font)
        top += LINE
        for i, tile in enumerate(tiles):
            picture.paste(tile, (MARGIN + i % columns * (side_x + GAP), top + i // columns * (side_y + GAP)))
        top += count * (side_y + GAP) + MARGIN
    return picture


def plain_grid(images: Tensor, columns: int, path: Path) -> None:
    """The images alone, in a PNG file."""
    tiles = [_tile(image, 1) for image in images]
    side_x, side_y = tiles[0].size
    lines = -(-len(tiles) // columns)
    picture = Image.new("RGB", (columns * (side_x + GAP) - GAP, lines * (side_y + GAP) - GAP), "white")
    for i, tile in enumerate(tiles):
        picture.paste(tile, (i % columns * (side_x + GAP), i // columns * (side_y + GAP)))
    picture.save(path)


def to_image(image: Tensor) -> Image.Image:
    """(channels, height, width) in [0, 1] → a picture, grey or RGB."""
    array = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def _tile(image: Tensor, cell: int) -> Image.Image:
    picture = to_image(image).convert("RGB")
    factor = max(1, -(-cell // picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
