"""Tiny random instances of diffusers' pipelines: ``zoo.CASES``, by class name. Importing the package registers them all."""

from __future__ import annotations

import importlib
import pkgutil

from zoo.core import ALWAYS_GUIDED, CASES, NOT_RELOADABLE, UNBUILDABLE, Case, absent, build, missing

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("test_"):
        importlib.import_module(f"zoo.{_module.name}")

__all__ = ["ALWAYS_GUIDED", "CASES", "NOT_RELOADABLE", "UNBUILDABLE", "Case", "absent", "build", "missing"]
