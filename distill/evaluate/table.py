"""Results as a table on the terminal and as HTML or Markdown cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS: dict[str, tuple[str, str]] = {
    "steps": ("steps", "d"),
    "guidance_scale": ("guidance", ".2g"),
    "fd_digits": ("FD digits ↓", ".3f"),
    "fd_emoji": ("FD emoji ↓", ".3f"),
    "fd_emoji_heldout": ("FD emoji held-out ↓", ".3f"),
    "emoji_clip": ("caption score ↑", ".3f"),
    "fd_digits_heldout": ("FD held-out ↓", ".3f"),
    "kid": ("KID ↓", ".4f"),
    "accuracy": ("accuracy ↑", ".1%"),
    "precision": ("precision ↑", ".3f"),
    "recall": ("recall ↑", ".3f"),
    "density": ("density ↑", ".3f"),
    "coverage": ("coverage ↑", ".3f"),
    "fid": ("FID ↓", ".2f"),
    "clip_score": ("CLIP ↑", ".3f"),
    "images_per_second": ("images/s ↑", ".0f"),
    "speedup": ("speed-up", ".1f"),
}
#: Numbers of a row that say how it was measured.
_CIRCUMSTANCES = {"samples", "batch_size", "seed", "seconds", "threads", "kid_std", "clip_scale"}


def cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(titles, cells) of the columns that any row has; numbers of a user's own metrics come last."""
    known = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    own = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, int | float) and k not in _CIRCUMSTANCES | COLUMNS.keys())
    columns = {key: COLUMNS[key] for key in known} | {key: (key, ".4g") for key in own}
    titles = ["", *(title for title, _ in columns.values())]
    return titles, [[str(row["name"]), *(_format(row.get(key), spec) for key, (_, spec) in columns.items())] for row in rows]


def _format(value: Any, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The table on stdout, whole even where the terminal is narrow or there is none."""
    from rich.console import Console
    from rich.table import Table

    titles, body = cells(rows)
    table = Table()
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, sum(max(map(len, column)) + 3 for column in zip(titles, *body, strict=True)) + 2)).print(table)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    titles, body = cells(rows)
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"
