"""YAML as plain data that remembers the line of every key, so that an error can point at it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML reads ``1e-4`` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_INTEGER = re.compile(r"^[-+]?[0-9][0-9_]*$")


def parse(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """(plain data, line number of every key path).

    Raises:
        UserError: for text that is not YAML, and for a key given twice (which YAML loaders accept in silence).
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    lines: dict[KeyPath, int] = {}

    def build(node: yaml.Node, path: KeyPath) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(loader.construct_object(key_node))  # type: ignore[no-untyped-call]
                if key in mapping:
                    raise UserError(f"{name}:{key_node.start_mark.line + 1}: the key {key!r} is given twice")
                here = path + (key,)
                lines[here] = key_node.start_mark.line + 1
                mapping[key] = build(value_node, here)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [build(item, path + (i,)) for i, item in enumerate(node.value)]
        if node.tag.endswith(":float") and _INTEGER.match(node.value):
            return int(node.value.replace("_", ""))
        try:
            return loader.construct_object(node)  # type: ignore[no-untyped-call]
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{name}:{node.start_mark.line + 1}: cannot read this value: {error}") from None

    return (None if node is None else build(node, ())), lines


def read(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """``parse`` of a file."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def override(tree: dict[str, Any], assignment: str) -> KeyPath:
    """Apply ``a.b.c=value`` (value in YAML) in place; the path that was set."""
    keys, equals, text = assignment.partition("=")
    path = tuple(keys.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"--set {assignment}: write it as section.key=value")
    value, _ = parse(text, f"--set {keys}")
    here = tree
    for key in path[:-1]:
        child = here.get(key)
        if child is None:
            child = here[key] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {assignment}: {key} is not a section")
        here = child
    here[path[-1]] = value
    return path
