"""How often a step calls each network, on average: methods draw at random how many steps a sample takes.

The method's generator runs a number of times with networks that answer at once, without a network behind them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction
from distill.methods.base import Batch, Method
from distill.plan_trace import TOGETHER
from distill.roles import Roles

Calls = Counter[tuple[str, int]]
FIRST, ALL = 4, 32  #: draws: a few to see whether there is any chance in it, then more


class _Blank(Denoiser):
    """Answers with what it was given."""

    def __init__(self, role: str, like: Denoiser, features: Mapping[str, Sequence[int]], calls: Calls) -> None:
        self.role, self.schedule, self.kind, self.shapes, self.calls = role, like.schedule, like.kind, features, calls

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        self.calls[self.role, len(x_t)] += 1
        caught = {name: torch.empty(len(x_t), *self.shapes[name], device=x_t.device) for name in features}
        return Prediction(x_t, self.kind, x_t, t, self.schedule, caught)


def average_calls(method: Method, roles: Roles, batch: Batch, features: Mapping[str, Sequence[int]], traced: Calls) -> dict[tuple[str, int], float]:
    """(role, batch) → calls per step.

    Args:
        features: shapes of the hidden features that the method asks for, without the batch.
        traced: the calls of one step; the answer, if chance has no part in them.
    """
    total: Calls = Counter()
    names = [role for role in ("teacher", "student", "critic", "winner", "target") if getattr(roles, role) is not None]
    draws = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while draws < ALL:
            calls: Calls = Counter()
            blank: dict[str, Any] = {role: _Blank(role, getattr(roles, role), features, calls) for role in names}
            if roles.together is not None:
                blank["together"] = replace(roles.together, network=_Blank(TOGETHER, roles.together.network, features, calls))
            for _ in method.step(replace(roles, **blank), batch):
                pass
            total += calls
            draws += 1
            if draws == FIRST and all(total[key] == FIRST * n for key, n in traced.items()):
                return {key: float(n) for key, n in traced.items()}
    return {key: n / draws for key, n in total.items()}
