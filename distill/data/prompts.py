"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path

from distill.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """A prompt per line of a text file, or the ``caption``, ``prompt`` or ``text`` of each line of a JSONL file.

    Raises:
        UserError: if the file cannot be read, has a bad line, or has no prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file: give a prompt a line, or JSONL") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(_caption(line, f"{path}:{number}") if path.suffix == ".jsonl" else line.strip())
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def _caption(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    text = next((row[k] for k in ("caption", "prompt", "text") if isinstance(row, dict) and isinstance(row.get(k), str)), None)
    if text is None:
        raise UserError(f"{where}: has no caption, prompt or text")
    return text
