"""The settings of a method in words."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from distill.describe import kind, settings
from distill.methods.sid import SiD


class Inner(BaseModel):
    low: float = 0.0


class Base(BaseModel):
    #: above
    #: it
    first: int = 1
    second: Annotated[float, Field(ge=0)] | None = None  #: behind it
    third: Literal["a", "b"] | Inner = Inner()


class Derived(Base):
    second: float | None = 2.5
    last: list[str]


def test_types_as_a_recipe_writes_them() -> None:
    assert kind(tuple[float, Annotated[int, Field(ge=1)]] | Inner | None) == "[number, whole number] | {low} | null"


def test_comments_defaults_and_what_a_subclass_changes() -> None:
    rows = {s.name: (s.kind, s.default, s.comment) for s in settings(Derived)}
    assert rows == {
        "first": ("whole number", "1", "above it"),
        "second": ("number | null", "2.5", "behind it"),
        "third": ("a | b | {low}", "{low: 0.0}", ""),
        "last": ("[text, …]", "required", ""),
    }


def test_every_setting_of_the_engine_says_what_it_is() -> None:
    silent = [s.name for s in settings(SiD) if not s.comment and s.name != "name"]
    assert not silent
