"""What a run says while it trains: metrics.jsonl, TensorBoard, and a progress bar (quiet when not a terminal)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Metrics by step.

    ``metrics.jsonl`` has one JSON object a line: ``{"step": 20, "student/loss": 0.1, …}``. When a run is resumed at a
    step, the lines from that step on are dropped first: they will be written again.

    Args:
        start: the step that training (re)starts from.
        total: the step that it ends at.
    """

    def __init__(self, folder: Path, start: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        _truncate(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start if start else None)
        self._bar = tqdm(total=total, initial=start, desc="training", unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def advance(self) -> None:
        self._bar.update(1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix({k.split("/")[-1]: f"{v:.3g}" for k, v in list(values.items())[:4]}, refresh=False)

    def note(self, text: str) -> None:
        """A line for the user, above the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _truncate(path: Path, start: int) -> None:
    kept = [row for row in read_metrics(path) if row["step"] < start]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)
