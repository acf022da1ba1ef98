"""``distill verify``: methods against closed forms, each with the ablation that must fail."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from pydantic import ValidationError

from distill.errors import UserError
from distill.losses.divergence import DIVERGENCES
from distill.methods import Method, available, find_method
from distill.verify import any_method, dmd2
from distill.verify.core import Check, timed

__all__ = ["Check", "checks", "run"]


def checks(name: str, divergences: Sequence[str] | None = None) -> Iterator[Check]:
    """The checks of one method: its own, where the toolkit has some, and those that hold for any method.

    Raises:
        UserError: for a method or divergence that there is not.
    """
    method = _found(name)
    for divergence in divergences or ():
        if divergence not in DIVERGENCES:
            raise UserError(f"there is no divergence {divergence!r}; known: {', '.join(DIVERGENCES)}")
    if name == "dmd2":
        yield from timed(dmd2.checks(divergences))
    elif ":" not in name and importlib.util.find_spec(own := f"{__name__}.{name}") is not None:  # distill/verify/METHOD.py
        yield from timed(importlib.import_module(own).checks())
    if not divergences:
        yield from timed(any_method.checks(name, made(name, method)))


def _found(name: str) -> type[Method]:
    try:
        return find_method(name)
    except KeyError as error:
        close = difflib.get_close_matches(name, available(), 1)
        reason = str(error.args[0]) if ":" in name else f"there is no method {name!r}"
        raise UserError(reason + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(available())}")) from None


def made(name: str, method: type[Method]) -> Method:
    """The method with its default settings.

    Raises:
        UserError: if it has a setting without a default.
    """
    own = method.model_fields["name"]
    try:
        return method(name=name if own.is_required() else own.default)
    except ValidationError as error:
        wanting = ", ".join(".".join(map(str, e["loc"])) or e["msg"] for e in error.errors())
        raise UserError(f"{name} cannot be checked: its default settings are not complete ({wanting})") from None


def run(methods: Sequence[str] | None = None, divergences: Sequence[str] | None = None, jobs: int | None = None) -> bool:
    """Print every check as it is made; whether all passed.

    Args:
        jobs: methods at a time, each in a process of one thread; as many as there are cores if not given.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    names = list(methods or (["dmd2"] if divergences else available()))
    if divergences and names != ["dmd2"]:
        raise UserError("--divergence is a setting of dmd2: distill verify dmd2 --divergence …")
    passed = failed = 0
    seconds = 0.0
    for check in _all(names, divergences, jobs or os.cpu_count() or 1):
        mark = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        wanted = f"must miss {check.bound}" if check.must_fail else check.bound
        console.print(f"{mark}  {check.subject:12} {check.name:78} {check.value:10.4g}   {wanted:22} {check.seconds:5.1f} s")
        passed, failed, seconds = passed + check.passed, failed + (not check.passed), seconds + check.seconds
    console.print(f"{passed} passed, {failed} failed in {seconds:.0f} s of work")
    return failed == 0


def _all(names: Sequence[str], divergences: Sequence[str] | None, jobs: int) -> Iterator[Check]:
    """The checks of several methods, in the order of the names."""
    jobs = min(jobs, len(names))
    if jobs == 1:
        for name in names:
            yield from checks(name, divergences)
        return
    for name in names:  # what is wrong with a name is said before anything is checked
        _found(name)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _one_thread) as pool:
        for made_of_one in pool.map(_listed, names):
            yield from made_of_one


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _listed(name: str) -> list[Check]:
    return list(checks(name))
