"""Import paths in recipes: a user's own method, metric, override, loss or reward."""

from __future__ import annotations

import importlib
from typing import Any


def import_object(path: str) -> Any:
    """What ``module:attribute`` names.

    Raises:
        ValueError: if there is no such module or attribute, or the path is not of this form.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValueError(f"{path!r} is not an import path: write module:name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
