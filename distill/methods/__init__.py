"""The methods by name: the toolkit's own, entry points of the group ``distill.methods``, or ``module:Class``."""

from __future__ import annotations

import importlib
import importlib.metadata

from distill.methods.base import Batch, Method, Update
from distill.methods.consistency import Consistency
from distill.methods.dmd2 import DMD2

__all__ = ["Batch", "Method", "Update", "available", "find_method"]

_OWN: tuple[type[Method], ...] = (DMD2, Consistency)


def available() -> dict[str, type[Method]]:
    """Every method that can be named without an import path."""
    found = {m.model_fields["name"].default: m for m in _OWN}
    for entry in importlib.metadata.entry_points(group="distill.methods"):
        found.setdefault(entry.name, entry.load())
    return found


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        KeyError: if there is none of that name (with the reason, for an import path).
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise KeyError(f"{name}: {error}") from None
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise KeyError(f"{name} is not a subclass of distill.methods.Method")
        return found
    return available()[name]
