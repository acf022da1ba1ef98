"""Where the recipes, pipeline files and small assets lie: inside the wheel, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Path of a shipped file or folder such as ``assets/digits-teacher`` or ``configs/quickstart.yaml``.

    The wheel carries ``assets/``, ``configs/`` and ``pipelines/`` inside the package; a checkout has them beside it.

    Raises:
        FileNotFoundError: if the installation lacks it.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        path = root / name
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} is not part of this installation of distill")


def find(name: str | Path) -> Path:
    """A path as the user wrote it if it exists, else the shipped file of that name, else the path unchanged."""
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    try:
        return resource(str(name))
    except FileNotFoundError:
        return path
