"""Upload an export to a repository on the Hugging Face hub: only when asked, and only after a yes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from distill.errors import UserError


def check_repository(name: str) -> None:
    """
    Raises:
        UserError: if it is no repository's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"--push {name} is no repository: write it as owner/name")


def check_reachable(name: str, yes: bool) -> None:
    """Refuse what cannot be pushed before anything is written.

    Raises:
        UserError: if the hub is off limits, nobody is logged in, or there is no terminal to ask on.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    check_repository(name)
    if HF_HUB_OFFLINE:
        raise UserError("--push needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave out --push")
    if not get_token():
        raise UserError("--push needs a login to the hub: run hf auth login, or set HF_TOKEN")
    if not yes and not sys.stdin.isatty():
        raise UserError(f"--push asks before it uploads, and there is no terminal to ask on: add --yes to upload to {name}")


def push(folder: Path, name: str, yes: bool, ask: Callable[[str], str] = input) -> str | None:
    """Upload the folder, after a yes; the folder stays.

    Args:
        yes: do not ask.

    Returns:
        The address of the repository, or None if the answer was not yes.

    Raises:
        UserError: if the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    files = [p for p in folder.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    if not yes and ask(f"Upload {folder} ({len(files)} files, {size / 1e6:,.1f} MB) to {name} on the hub? [y/N] ").strip().lower() not in ("y", "yes"):
        return None
    api = HfApi()
    try:
        created = api.create_repo(name, exist_ok=True, private=None)
        api.upload_folder(repo_id=created.repo_id, folder_path=os.fspath(folder), commit_message="Upload a distilled student")
    except Exception as error:  # the hub's, the network's, the file system's: one line for all
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder} was written, but could not be uploaded to {name}: {text}") from error
    return str(created)
