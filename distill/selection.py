"""Selected layers: full weights of which a part is trained, named by patterns; the rest is shared with the teacher."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from distill.errors import UserError


@dataclass(frozen=True)
class Selection:
    """Which parameters are trained: those that a ``train`` pattern fits (all, where there is none) and no ``freeze`` one.

    A pattern is a parameter's or module's name (``mid_block``: everything in it), a glob over names in which ``*`` also
    crosses dots (``*.attn2``, ``down_blocks.*.bias``), or ``re:`` and a regular expression that fits anywhere in a
    parameter's name (``re:attentions\\.[01]\\.``).
    """

    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()

    def names(self, backbone: nn.Module) -> list[str]:
        """Names of the trained parameters, in the backbone's order.

        Raises:
            UserError: if a pattern fits nothing, is no regular expression, or nothing is left to train.
        """
        known = [name for name, _ in backbone.named_parameters()]
        chosen = _fitting("student.train", self.train, known, backbone) if self.train else set(known)
        chosen -= _fitting("student.freeze", self.freeze, known, backbone)
        if not chosen:
            raise UserError(f"student.freeze: nothing of {type(backbone).__name__} is left to train")
        return [name for name in known if name in chosen]


def _fitting(key: str, patterns: Sequence[str], names: Sequence[str], backbone: nn.Module) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = [n for n in names if _fits(key, pattern, n)]
        if not fitting:
            modules = [n for n, _ in backbone.named_modules() if n]
            near = _near(pattern, [*modules, *names])
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(n for n, _ in backbone.named_children())}"
            raise UserError(f"{key}: no parameter of {type(backbone).__name__} fits {pattern!r}; {hint}")
        chosen.update(fitting)
    return chosen


def _fits(key: str, pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern.removeprefix("re:"), name) is not None
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _near(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three names that resemble the pattern, whole ones or their last parts."""
    plain = pattern.removeprefix("re:").strip("*.^$")
    whole = list(dict.fromkeys(names))
    parts = list(dict.fromkeys(part for name in whole for part in name.split(".") if not part.isdigit()))
    return difflib.get_close_matches(plain, whole, 2) + [p for p in difflib.get_close_matches(plain, parts, 2) if p not in whole][:1]


def shared_copy(backbone: nn.Module, trained: Sequence[str]) -> nn.Module:
    """A copy whose ``trained`` parameters are its own; every other tensor is the original's, not copied."""
    own = set(trained)
    shared = [p for n, p in backbone.named_parameters() if n not in own] + list(backbone.buffers())
    return copy.deepcopy(backbone, {id(tensor): tensor for tensor in shared})


def share(backbone: nn.Module, original: nn.Module, names: Iterable[str]) -> None:
    """Put the original's parameters of these names in the place of the backbone's own."""
    for name in names:
        module, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(module), leaf, original.get_parameter(name))
