"""Progress bars that are quiet when not on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with a bar on stderr if that is a terminal."""
    return iter(tqdm(items, desc=what, disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False))
