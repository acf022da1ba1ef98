"""The methods by name: every module of this package, entry points of the group ``distill.methods``, or ``module:Class``."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from functools import cache

from distill.imports import import_object
from distill.methods.base import Batch, Method, Update

__all__ = ["Batch", "Method", "Update", "available", "find_method"]


@cache
def available() -> dict[str, type[Method]]:
    """Every method that can be named without an import path."""
    found: dict[str, type[Method]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__ and value is not Method:
                found[value.model_fields["name"].default] = value
    for entry in importlib.metadata.entry_points(group="distill.methods"):
        found.setdefault(entry.name, entry.load())
    return found


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        KeyError: if there is none of that name (with the reason, for an import path).
    """
    if ":" not in name:
        return available()[name]
    try:
        found = import_object(name)
    except ValueError as error:
        raise KeyError(str(error)) from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise KeyError(f"{name} is not a subclass of distill.methods.Method")
    return found
