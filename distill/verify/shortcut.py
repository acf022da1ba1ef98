"""Shortcut models on a Gaussian: halves make the whole; wholes do not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from distill.methods import flow_map as rule
from distill.methods.shortcut import Shortcut
from distill.verify.core import Check, at_most, replaced
from distill.verify.flow_map import DATA_STEPS, SCHEDULES, map_errors, trained


def wholes(t: Tensor, m: Tensor, s: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both jumps told the whole's length d in place of their own, d/2."""
    return (t, s), (m, m - (t - s))


def checks() -> Iterator[Check]:
    errors = map_errors(*trained(Shortcut(), SCHEDULES["flow"], DATA_STEPS, 512), (1, 4, 16))
    for steps, error in zip((1, 4, 16), errors, strict=True):
        yield at_most("shortcut", f"flow: error of the map learnt from samples, {steps} steps", error, 0.05)
    with replaced(rule, "halves", wholes):
        error = map_errors(*trained(Shortcut(), SCHEDULES["flow"], 800), (1,))[0]
    yield at_most("shortcut", "ablation: bootstrapped from jumps of length d, not d/2, 1 step", error, 0.05, must_fail=True)
