"""A heat map of runs, drawn with Pillow: rows are seeds, columns learning rates, a block for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDE, HIGH, GAP, LEFT, TOP, BOTTOM = 124, 56, 36, 96, 150, 150  #: pixels; shown at half their size
INK, GREY, RED, PAPER = (30, 30, 36), (120, 120, 128), (200, 30, 40), (255, 255, 255)
#: Colours of 0, ¼, ½, ¾ and 1 of the scale: even in lightness, and told apart without red and green.
SCALE = [(252, 251, 240), (199, 225, 205), (108, 178, 193), (55, 105, 165), (44, 30, 92)]

PLAIN = str.maketrans({"÷": "/", "×": "x", "–": "-"})  #: Pillow's own font has no more; no font of the system is relied on


@dataclass(frozen=True)
class Cell:
    """One run."""

    ratio: float  #: distance over the teacher's; infinite if it has none
    collapsed: str | None = None  #: why


def colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    i = min(int(place), len(SCALE) - 2)
    low, high = SCALE[i], SCALE[i + 1]
    r, g, b = (round(low[c] + (place - i) * (high[c] - low[c])) for c in range(3))
    return r, g, b


def written(ratio: float) -> str:
    return "inf" if math.isinf(ratio) else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def draw(blocks: Mapping[str, Sequence[tuple[str, Sequence[Cell | None]]]], rows: Sequence[str], title: str) -> Image.Image:
    """Blocks: method → (rate, one cell per row; None for a run that is missing)."""
    known = [c.ratio for columns in blocks.values() for _, cells in columns for c in cells if c is not None and math.isfinite(c.ratio)]
    low, high = math.floor(min(known, default=1.0)), max(*known, 2.0) if known else 2.0
    low = max(low, 0.5)
    count = sum(len(columns) for columns in blocks.values())
    width = LEFT + count * WIDE + (len(blocks) - 1) * GAP + 40
    image = Image.new("RGB", (width, TOP + len(rows) * HIGH + BOTTOM), PAPER)
    pen, small, large = ImageDraw.Draw(image), ImageFont.load_default(24), ImageFont.load_default(30)

    def share(ratio: float) -> float:
        return math.log(max(ratio, low) / low) / math.log(high / low) if math.isfinite(ratio) else 1.0

    def text(x: float, y: float, said: str, font: Any = small, fill: Any = INK, anchor: str = "mm") -> None:
        pen.text((x, y), said.translate(PLAIN), fill=fill, font=font, anchor=anchor)

    text(LEFT, 34, title, large, anchor="lm")
    text(LEFT - 16, TOP - 24, "seed", fill=GREY, anchor="rm")
    for i, row in enumerate(rows):
        text(LEFT - 16, TOP + (i + 0.5) * HIGH, row, anchor="rm")
    x = LEFT
    for name, columns in blocks.items():
        text(x + len(columns) * WIDE / 2, TOP - 66, name, large)
        for rate, cells in columns:
            text(x + WIDE / 2, TOP - 24, f"rates {rate}", fill=GREY)
            for i, cell in enumerate(cells):
                paint(pen, text, x, TOP + i * HIGH, cell, share(cell.ratio) if cell else 0.0)
            x += WIDE
        x += GAP
    legend(pen, text, image.height - BOTTOM + 34, width, low, high)
    return image


def paint(pen: ImageDraw.ImageDraw, text: Any, x: int, y: int, cell: Cell | None, share: float) -> None:
    box = (x + 2, y + 2, x + WIDE - 3, y + HIGH - 3)
    if cell is None:
        pen.rectangle(box, outline=GREY)
        text(x + WIDE / 2, y + HIGH / 2, "–", fill=GREY)
        return
    pen.rectangle(box, fill=colour(share))
    text(x + WIDE / 2, y + HIGH / 2, written(cell.ratio), fill=INK if share < 0.55 else PAPER)
    if cell.collapsed:
        mark(pen, x, y)


def mark(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """A red frame and a cross in its corner: not by colour alone."""
    pen.rectangle((x + 2, y + 2, x + WIDE - 3, y + HIGH - 3), outline=RED, width=5)
    pen.line((x + 12, y + 12, x + 24, y + 24), fill=RED, width=5)
    pen.line((x + 12, y + 24, x + 24, y + 12), fill=RED, width=5)


def legend(pen: ImageDraw.ImageDraw, text: Any, y: int, width: int, low: float, high: float) -> None:
    length = 420
    for i in range(length):
        pen.line((LEFT + i, y, LEFT + i, y + 26), fill=colour(i / (length - 1)))
    pen.rectangle((LEFT, y, LEFT + length, y + 26), outline=GREY)
    for i in range(4):
        text(LEFT + i * length / 3, y + 48, written(low * (high / low) ** (i / 3)), fill=GREY)
    x = LEFT + length + 90
    mark(pen, x, y - 14)
    text(x + WIDE + 14, y + 13, "collapsed", anchor="lm")
