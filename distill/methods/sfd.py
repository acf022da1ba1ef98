"""SFD, score forgetting distillation: a student that is distilled and made to forget in one go.

    Chen, Zhang, Zhou 2025, "Score Forgetting Distillation", ICLR, arXiv 2409.11219

For a condition c_f that is to be forgotten the student's samples are held against the teacher's answer to a safe one, c_s:

    L = E_c SiD( D_T(·, c), D_F(·, c) )  +  E_{c_f} SiD( D_T(·, c_s), D_F(·, c_f) ),        x = G(z, c) or G(z, c_f),

so that a request for c_f is given c_s's law. The critic learns the samples of c_f under their own condition c_f: under c_s it would
take them for c_s's. Only what the teacher is told differs; every objective and weighting of the engine may stand in SiD's place.

The data's own requests for c_f belong to the second term, never to the first. ``share`` of each batch asks for c_f beside them: where
it is one prompt of thousands it would hardly be met. (The paper draws two batches and weighs the second one by lambda_f: this
is share/(1 − share).)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.errors import UserError
from distill.matching.objectives import Objective
from distill.matching.times import TimeLaw
from distill.methods.base import Batch, Update
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles

Input = int | str


class SFD(DistributionMatching):
    """Score forgetting distillation. With nothing to forget it is SiD."""

    name: Literal["sfd"] = "sfd"  # type: ignore[assignment]
    objective: Objective = "sid"
    score_times: TimeLaw = (0.04, 0.71)
    alpha: float = 1.0  # type: ignore[assignment]  # the paper: 1.2, and 1 for Stable Diffusion; above 1 wide students are driven outwards (see sid)

    forget: list[Input] = []  #: classes or prompts
    #: the class or prompt to give in their place; a list: one of it at random for each sample; null: the teacher's null condition
    instead: Input | Annotated[list[Input], Field(min_length=1)] | None = None
    share: Annotated[float, Field(ge=0, lt=1)] = 0.2  #: of each batch that asks for what is forgotten, beside the data's own requests

    @model_validator(mode="after")
    def _forgettable(self) -> SFD:
        if self.instead is not None and not self.forget:
            raise ValueError("instead is what to give in place of what is forgotten, and forget is empty: set forget")
        if overlap := set(self.forget) & set(self._safe):
            raise ValueError(f"{next(iter(overlap))!r} cannot be forgotten and be given instead")
        if self.forget and self.needs_images():
            raise ValueError("real samples of what is forgotten would teach it again: leave out gan, and terms and a rollout that need real data")
        return self

    @property
    def _safe(self) -> list[Input]:
        return [] if self.instead is None else list(self.instead) if isinstance(self.instead, list) else [self.instead]

    def extra_inputs(self) -> list[Any]:
        return [*self.forget, *self._safe]

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        yield from super().step(roles, self._asked(roles, batch))

    def _asked(self, roles: Roles, batch: Batch) -> Batch:
        """The batch with some of its requests replaced by requests for what is forgotten."""
        if not self.forget or not self.share:
            return batch
        n, extra = len(batch.noise), _extra(roles)
        asked, which = torch.rand(n) < self.share, torch.randint(len(self.forget), (n,))
        inputs = [self.forget[int(i)] if a else given for a, i, given in zip(asked, which, batch.inputs, strict=True)]
        group = None if batch.group is None else torch.where(asked.to(batch.group.device), (-1 - which).to(batch.group), batch.group)
        return replace(batch, condition=batch.condition.where(~asked, extra[which.to(batch.noise.device)]), inputs=inputs, group=group)

    def _reference(self, roles: Roles, batch: Batch) -> tuple[Denoiser, Condition]:
        """The teacher, told something safe where the student was asked for what is forgotten."""
        kept = torch.tensor([given not in self.forget for given in batch.inputs], dtype=torch.bool)
        if bool(kept.all()):
            return roles.teacher, batch.condition
        return roles.teacher, batch.condition.where(kept, self._safe_condition(roles, batch))

    def _safe_condition(self, roles: Roles, batch: Batch) -> Condition:
        if not self._safe:
            if batch.condition.null is None:
                raise UserError("method.instead: this teacher has no null condition: name the class or prompt to give in place of what is forgotten")
            return Condition(batch.condition.null)
        which: Tensor = len(self.forget) + torch.randint(len(self._safe), (len(batch.noise),))
        return _extra(roles)[which.to(batch.noise.device)]


def _extra(roles: Roles) -> Condition:
    assert roles.extra is not None
    return roles.extra
