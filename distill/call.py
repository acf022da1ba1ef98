"""The calling convention of a backbone, as data: which argument takes what, and where the answer lies.

Arguments are named by their path inside the call: ``added_cond_kwargs.time_ids`` is a key of a mapping (``samples{2}`` where the
key is a number), ``x[0]`` an entry of a list and ``rope(1)`` one of a tuple.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from distill.arrangement import Arrangement

Values = Mapping[str, Tensor | list[Any]]
REST = "#rest"  #: the condition that fills what the sample leaves free in the state


@dataclass(frozen=True)
class Layout:
    """How the entries of the samples lie in one argument.

    ``stacked``: along ``axis``, ``rows`` of them per sample. ``listed``: in a list, one entry (or several) per sample;
    ``nested``: in a list of lists of one entry.
    ``shared``: one value for the whole call, which must be the same for all of its samples.
    """

    kind: str = "stacked"
    axis: int = 0
    rows: int = 1

    def split(self, value: Any, batch: int) -> Tensor | list[Any]:
        """One entry per sample: a (batch, ...) tensor, or a list."""
        if self.kind == "shared":
            return [value] * batch
        if self.kind == "nested":
            return [entry[0] for entry in value]
        if self.kind == "listed":
            entries = [value[i * self.rows : (i + 1) * self.rows] for i in range(batch)]
            return [e[0] for e in entries] if self.rows == 1 else entries
        value = value.movedim(self.axis, 0)
        if len(value) == self.rows and batch > 1:  # a fixed argument of the pipeline's call, the same for all
            value = value.repeat(batch, *(1,) * (value.dim() - 1))
        return value if self.rows == 1 else value.reshape(batch, self.rows, *value.shape[1:])

    def join(self, entries: Tensor | list[Any]) -> Any:
        """The inverse of ``split``.

        Raises:
            ValueError: if entries that one call shares differ.
        """
        if self.kind == "shared":
            if any(not same(entries[0], e) for e in entries[1:]):
                raise ValueError("these samples cannot share a call: their conditions have different lengths")
            return entries[0]
        if self.kind == "nested":
            return [[entry] for entry in entries]
        if self.kind == "listed":
            return list(entries) if self.rows == 1 else [e for several in entries for e in several]
        entries = entries if isinstance(entries, Tensor) else torch.stack(entries)
        value = entries if self.rows == 1 else entries.flatten(0, 1)
        return value.movedim(0, self.axis)


    def joins(self, entries: Tensor | list[Any]) -> bool:
        """Whether one call can take these: conditions of one length, or lists of any."""
        if self.kind == "shared":
            return all(same(entries[0], e) for e in entries[1:])
        return self.kind != "stacked" or isinstance(entries, Tensor) or len({e.shape for e in entries}) == 1


@dataclass(frozen=True)
class Affine:
    """scale · x + shift, element by element."""

    scale: Tensor | float = 1.0
    shift: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """(batch,) → (batch, *scale's shape)."""
        if isinstance(self.scale, Tensor) and self.scale.dim():
            x = x.reshape(-1, *(1,) * self.scale.dim())
            return x * self.scale.to(x) + self.shift
        return x * self.scale + self.shift


@dataclass(frozen=True)
class Call:
    """How a backbone is called and answers."""

    state: str  #: path of the argument that takes x_t
    times: Mapping[str, Affine] = field(default_factory=dict)  #: arguments that are functions of the scheduler's timestep
    constants: Mapping[str, Any] = field(default_factory=dict)  #: arguments that are the same at every call
    layouts: Mapping[str, Layout] = field(default_factory=dict)  #: of the state and of the conditions
    enter: Arrangement | None = None  #: x_t → the state of one sample; None: as it is
    leave: Arrangement | None = None  #: the answer for one sample → the model output; None: as it is
    sign: float = 1.0  #: some pipelines negate the answer
    guidance: str | None = None  #: takes a sinusoidal embedding of the guidance scale (``time_cond_proj_dim``)
    conditional: int = 1  #: which half of a batch that is doubled for guidance is the conditional one
    embedded: tuple[str, Affine] | None = None  #: takes the guidance scale itself (distilled guidance: Flux and others)
    others: Mapping[str, Arrangement] = field(default_factory=dict)  #: arguments that take further parts of x_t, where the state takes one part
    gathered: bool = False  #: the model output lies in all tensors of the answer, one after another, not in the first
    alone: bool = False  #: a call holds one sample, as one sequence of all its tokens

    @property
    def varying(self) -> set[str | None]:
        """The arguments that take x_t, the time or a role's own guidance: no conditions."""
        return {self.state, self.guidance, *self.others, *self.times}

    def apart(self, values: Values) -> bool:
        """Whether samples with these conditions need a call each."""
        conditions = {k: v for k, v in values.items() if k != REST and ":" not in k}
        return self.alone or any(not self.layouts.get(path, Layout()).joins(entries) for path, entries in conditions.items())

    def arguments(self, x_t: Tensor, time: Tensor, values: Values, dtype: torch.dtype) -> dict[str, Any]:
        """The flat keyword arguments for states x_t (batch, ...) at scheduler timesteps ``time`` (batch,)."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        rest = values.get(REST)
        state = x_t.to(dtype)
        if self.enter is not None:
            state = self.enter(state, cast(rest) if isinstance(rest, Tensor) else None)
        flat: dict[str, Any] = dict(self.constants)
        for path, entries in values.items():
            if path != REST and ":" not in path:  # those with a colon are a companion's
                layout = self.layouts.get(path, Layout())
                flat[path] = layout.join(cast(entries) if isinstance(entries, Tensor) else [cast(e) for e in entries])
        layout = self.layouts.get(self.state, Layout())
        flat[self.state] = layout.join(state if layout.kind == "stacked" else list(state))
        for path, part in self.others.items():
            entries = part(x_t.to(dtype))
            layout = self.layouts.get(path, Layout())
            flat[path] = layout.join(entries if layout.kind == "stacked" else list(entries))
        for path, affine in self.times.items():
            layout = self.layouts.get(path, Layout())
            value = affine(time).float()
            if layout.kind == "stacked" and layout.rows > 1:
                value = value.unsqueeze(1).expand(-1, layout.rows, *value.shape[1:])
            flat[path] = layout.join(value if layout.kind == "stacked" else list(value))
        return flat

    def answer(self, output: Any, batch: int) -> Tensor:
        """The model output (batch, ...) in what the backbone returned."""
        value = self.tensor(output, batch)
        rows = len(value) // batch
        return self.model_output(value if self.leave is None or rows == 1 else value.reshape(batch, rows, *value.shape[1:]))

    def tensor(self, output: Any, rows: int) -> Tensor:
        """The tensor (rows, ...) of what the backbone returned in which the model output lies."""
        return all_tensors(output, rows) if self.gathered else first_tensor(output, rows)

    def model_output(self, value: Tensor) -> Tensor:
        """The part of an answer (batch, ...) that the scheduler is given, with its sign."""
        value = value if self.leave is None else self.leave(value)
        return value if self.sign == 1 else self.sign * value


def first_tensor(output: Any, batch: int | None = None) -> Tensor:
    """The first tensor of a backbone's answer: of a tuple, of an output class; a list of one per sample is stacked."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()))
        elif isinstance(output, (tuple, list)):
            listed = isinstance(output, list) and output and all(isinstance(o, Tensor) for o in output)
            output = torch.stack(list(output)) if listed and (batch is None or len(output) == batch) else output[0]
        else:
            output = next(v for v in vars(output).values() if v is not None)
    return output


def all_tensors(output: Any, rows: int) -> Tensor:
    """The tensors of a backbone's answer that have so many rows, one after another: (rows, all of their elements); the first
    tensor, if there are no two such."""
    leaves = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.dim() > 1 and len(v) == rows]
    return torch.cat([v.flatten(1) for v in leaves], 1) if len(leaves) > 1 else first_tensor(output, rows)


_PART = re.compile(r"\.([^.\[({]+)|\[(\d+)\]|\((\d+)\)|\{(\d+)\}")


def key_path(path: str, key: Any) -> str:
    """The path of a mapping's key."""
    if isinstance(key, int):
        return f"{path}{{{key}}}"
    return f"{path}.{key}" if path else str(key)


def flatten(arguments: Mapping[str, Any], whole: Sequence[str] = ()) -> dict[str, Any]:
    """Nested arguments by path. Mappings are always opened; lists and tuples if they hold a tensor somewhere.

    Args:
        whole: paths that are not opened.
    """
    flat: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        if path in whole:
            flat[path] = value
        elif isinstance(value, Mapping) and value:
            for key, inner in value.items():
                visit(inner, key_path(path, key))
        elif type(value) in (list, tuple) and _holds_tensor(value):
            left, right = "[]" if isinstance(value, list) else "()"
            for i, inner in enumerate(value):
                visit(inner, f"{path}{left}{i}{right}")
        else:
            flat[path] = value

    for key, value in arguments.items():
        visit(value, key)
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        parts = [next((kind, text) for kind, text in enumerate(m.groups()) if text is not None) for m in _PART.finditer("." + path)]
        here: dict[Any, Any] = nested
        for kind, text in parts[:-1]:
            here = here.setdefault((kind, text), {})
        here[parts[-1]] = value

    def close(node: Any) -> Any:
        if not isinstance(node, dict) or not node or not all(isinstance(k, tuple) for k in node):
            return node
        kind = next(iter(node))[0]
        if kind == 0:
            return {text: close(inner) for (_, text), inner in node.items()}
        if kind == 3:
            return {int(text): close(inner) for (_, text), inner in node.items()}
        entries = [close(inner) for _, inner in sorted(node.items(), key=lambda item: int(item[0][1]))]
        return entries if kind == 1 else tuple(entries)

    closed: dict[str, Any] = close(nested)
    return closed


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(v) for v in value)
    if isinstance(value, Mapping):
        return any(_holds_tensor(v) for v in value.values())
    return isinstance(value, Tensor)


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors by type, shape and value."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    try:
        return bool(a == b)
    except (ValueError, RuntimeError, TypeError):
        return False
