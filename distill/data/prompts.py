"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.errors import UserError

KEYS = ("caption", "prompt", "text")  #: of a JSONL row, whichever it has


def read_prompts(path: Path) -> list[str]:
    """A prompt per line of a text file, or the ``caption``, ``prompt`` or ``text`` of each line of a JSONL file.

    Raises:
        UserError: if the file cannot be read, has a bad line, or has no prompts.
    """
    if path.suffix == ".jsonl":
        prompts = [caption(row, where) for where, row in read_rows(path)]
    else:
        prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put at its start.

    Raises:
        UserError: if it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start}): save it as UTF-8") from None


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, row) of each line of a JSONL file that is not empty.

    Raises:
        UserError: naming the line that is not a JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() would also split inside a string
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: should be a JSON object with {', '.join(KEYS[:-1])} or {KEYS[-1]}")
        rows.append((where, row))
    return rows


def caption(row: dict[str, Any], where: str) -> str:
    """The text of a row.

    Raises:
        UserError: if it has none.
    """
    text = next((row[key] for key in KEYS if isinstance(row.get(key), str)), None)
    if text is None:
        raise UserError(f"{where}: has no {', '.join(KEYS[:-1])} or {KEYS[-1]}")
    return text
