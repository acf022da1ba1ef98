"""Import paths in recipes: a user's own method, metric, override, loss or reward."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def import_object(path: str) -> Any:
    """What ``module:attribute`` names; a module may lie in the current folder, which a command's own path does not hold.

    Raises:
        ValueError: if there is no such module or attribute, or the path is not of this form.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValueError(f"{path!r} is not an import path: write module:name")
    top = module.split(".")[0]
    here = str(Path.cwd())
    if here not in sys.path and (Path(here, top + ".py").is_file() or Path(here, top, "__init__.py").is_file()):
        sys.path.append(here)  # last: it hides nothing that is installed
        importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
