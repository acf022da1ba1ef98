"""A smaller student: the teacher's class with fewer blocks or channels, started from the teacher's weights.

* Fewer blocks: block i of l comes from the teacher's block round(i (L − 1) / (l − 1)) of L: the first and the last are
  kept, the others are spread evenly. This holds in every list of blocks, also in those inside blocks.
* Fewer channels: every axis that shrinks keeps its leading slice, ``W_student = W[:rows, :columns, …]``.

With an unchanged architecture the result is an exact copy. Slices are a start, not an approximation: where an axis joins
two parts (a U-Net's skip connections, an attention's heads), the leading slice takes from the first part alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from distill.errors import UserError


def shrunk(backbone: nn.Module, changes: Mapping[str, Any], new: Collection[str] = ()) -> nn.Module:
    """A backbone of the same class with some settings of its config changed, started from the given one's weights.

    Args:
        changes: settings of the config, such as ``{"num_layers": 6}``.
        new: names of parameters that the original lacks and that keep their own initialisation.

    Returns:
        It, in eval mode, on the original's device and in its dtype.

    Raises:
        UserError: if a setting is unknown or impossible, or a size grows.
    """
    kind = type(backbone)
    config = {k: v for k, v in dict(backbone.config).items() if not k.startswith("_")}  # type: ignore[arg-type]
    for key in changes:
        if key not in config:
            close = difflib.get_close_matches(key, config, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(config)}"
            raise UserError(f"student.architecture: {kind.__name__} has no setting {key!r}{hint}")
    try:
        made: nn.Module = kind.from_config({**config, **changes})  # type: ignore[attr-defined]
    except Exception as error:  # whatever the class makes of impossible sizes
        raise UserError(f"student.architecture: {kind.__name__} cannot be built so: {type(error).__name__}: {error}") from None
    weights = backbone.state_dict()
    started = {name: _slice(weights, source_of(name, made, backbone), name, value) for name, value in made.state_dict().items() if name not in new}
    made.load_state_dict(started, strict=False)
    first = next(backbone.parameters())
    return nn.Module.to(made.eval(), first.device, first.dtype)  # the class's own warns of a cast that is meant


def _slice(weights: Mapping[str, Tensor], source: str, name: str, like: Tensor) -> Tensor:
    value = weights.get(source)
    if value is None or value.dim() != like.dim():
        raise UserError(f"student.architecture: {name} of the student has no counterpart in the teacher: only smaller students can be started from it")
    if any(small > large for small, large in zip(like.shape, value.shape, strict=True)):
        shapes = " instead of ".join("×".join(map(str, s)) for s in (like.shape, value.shape))
        raise UserError(f"student.architecture: {name} would grow ({shapes}): sizes can only shrink")
    return value[tuple(slice(n) for n in like.shape)].to(like.device)


def source_of(name: str, student: nn.Module, teacher: nn.Module) -> str:
    """The teacher's name for a tensor of the student: each index in a list of blocks becomes that of the chosen block.

    Raises:
        UserError: if a list is longer than the teacher's.
    """
    source: list[str] = []
    here: Any = student
    there: Any = teacher
    for part in name.split("."):
        chosen = part
        if isinstance(here, nn.ModuleList) and isinstance(there, nn.ModuleList):
            if len(here) > len(there):
                path = ".".join(source)
                raise UserError(f"student.architecture: {path} would have {len(here)} blocks, and the teacher has {len(there)}: sizes can only shrink")
            chosen = str(kept_block(int(part), len(here), len(there)))
        here, there = (getattr(module, key, None) for module, key in ((here, part), (there, chosen)))
        source.append(chosen)
    return ".".join(source)


def kept_block(index: int, blocks: int, of: int) -> int:
    """Which of the teacher's ``of`` blocks the student's block ``index`` of ``blocks`` comes from."""
    return index if blocks == 1 else round(index * (of - 1) / (blocks - 1))
