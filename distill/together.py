"""Roles of one shared backbone asked in one call: the batch is joined, and each part of it runs with its own adapter.

    teacher(x_t, null), teacher(x_t, c), critic(x_t, c)   →   one call of 3 × batch

The backbone's own products are then one larger product each; only the adapters' small ones are apart. Without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.adapters import Adapters
from distill.denoiser import Condition, Denoiser, Prediction, cat, same_shapes
from distill.guidance import Guided


@dataclass(frozen=True)
class Question:
    """What a role is asked: x_t (batch, ...), t (batch,) or scalar."""

    adapter: str | None  #: None: the teacher
    x_t: Tensor
    t: Tensor
    condition: Condition


@dataclass(frozen=True)
class Together:
    """The shared backbone of several roles, with no adapter of its own in use.

    Args:
        network: its ``predict`` is called within ``adapters.mixed``.
    """

    network: Denoiser
    adapters: Adapters

    @torch.no_grad()
    def ask(self, questions: Sequence[Question]) -> list[Prediction] | None:
        """A prediction per question, from one call; None where their conditions do not fit into one."""
        conditions = _alike([q.condition for q in questions], [len(q.x_t) for q in questions])
        if any(not same_shapes(conditions[0], c) for c in conditions[1:]):
            return None
        sizes = [len(q.x_t) for q in questions]
        times = torch.cat([q.t.to(q.x_t.device).expand(len(q.x_t)) for q in questions])
        with self.adapters.mixed([(q.adapter, n) for q, n in zip(questions, sizes, strict=True)]):
            joined = self.network.predict(torch.cat([q.x_t for q in questions]), times, cat(conditions))
        values = joined.value.split(sizes)
        extras = [None] * len(sizes) if joined.extra is None else list(joined.extra.split(sizes))
        asked = zip(questions, values, extras, strict=True)
        return [Prediction(value, joined.kind, q.x_t, q.t, joined.schedule, extra=extra) for q, value, extra in asked]

    def guided(self, asked: Sequence[tuple[str | None, Guided, Condition]], x_t: Tensor, t: Tensor) -> list[Prediction] | None:
        """The same for guided roles (adapter, network, condition) at one (x_t, t); None where one call does not do."""
        each = [network.asked(x_t, t, condition) for _, network, condition in asked]
        if any(question is None for question in each):
            return None
        questions = [Question(adapter, x, s, told or Condition()) for (adapter, _, _), (x, s, told) in zip(asked, filter(None, each), strict=True)]
        answers = self.ask(questions)
        if answers is None:
            return None
        return [network.answered(answer, x_t, t, condition) for (_, network, condition), answer in zip(asked, answers, strict=True)]


def _alike(conditions: Sequence[Condition], sizes: Sequence[int]) -> list[Condition]:
    """Without the null conditions; guidance scales for all (1: off), if there are any."""
    scaled = next((c.guidance for c in conditions if c.guidance is not None), None)
    if scaled is None:
        return [replace(c, null=None) for c in conditions]
    return [replace(c, null=None, guidance=scaled.new_ones(n) if c.guidance is None else c.guidance) for c, n in zip(conditions, sizes, strict=True)]
