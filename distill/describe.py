"""The settings of a method in words, for ``distill methods NAME``: types as a recipe writes them, and the comments of the source."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

_COMMENT = re.compile(r"#:\s?(.*)$")
_FIELD = re.compile(r"^    (\w+)\s*:")


@dataclass(frozen=True)
class Setting:
    """One key of a section."""

    name: str
    kind: str  #: what it may be: "number", "a | b", "[number, number]", "{law, low, …}"
    default: str
    comment: str


def settings(section: type[BaseModel]) -> Iterator[Setting]:
    """The keys of a section in their order."""
    comments = _comments(section)
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        yield Setting(name, kind(field.annotation), default, comments.get(name, ""))


def kind(annotation: Any) -> str:
    """A type as one writes it in a recipe.

    >>> kind(tuple[float, float] | None)
    '[number, number] | null'
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(kind(a) for a in arguments))
    if origin in (list, tuple):
        inside = [kind(a) for a in arguments if a is not Ellipsis]
        return f"[{inside[0]}, …]" if origin is list or Ellipsis in arguments else f"[{', '.join(inside)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null"}.get(annotation, str(annotation))


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _comments(section: type[BaseModel]) -> dict[str, str]:
    """Each field's ``#:`` comment: behind it, or on the lines above it. A class's own comes before its base's."""
    found: dict[str, str] = {}
    for cls in section.__mro__:
        if not (isinstance(cls, type) and issubclass(cls, BaseModel) and cls is not BaseModel):
            continue
        try:
            lines = inspect.getsource(cls).splitlines()
        except (OSError, TypeError):  # made at run time
            continue
        above: list[str] = []
        for line in lines:
            comment = _COMMENT.search(line)
            field = _FIELD.match(line)
            if field is None:
                above = [*above, comment[1].strip()] if comment and line.strip().startswith("#:") else []
                continue
            words = " ".join([*above, *([comment[1].strip()] if comment else [])])
            if words:
                found.setdefault(field[1], words)
            above = []
    return found
