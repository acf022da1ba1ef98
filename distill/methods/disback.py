"""DisBack: distil along the path on which the teacher degrades to the student, backwards.

    Zhang et al. 2025, "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation", ICLR, arXiv 2408.15991

A teacher's score is right near its data alone, and the first samples of a student are far from them.

    1. Degradation recording. With the student frozen as it is at first, a copy of the teacher learns its samples (the critic's own loss);
       it is kept at equal distances: T_0 the teacher, T_1, …, T_N, where T_N knows the initial student.
    2. Backtracking. The engine's score difference towards T_{N−1}, …, T_1 in turn, and T_0 for what is left of the training.

The copy that degrades is the critic: when the student starts to move, its critic has its score already (the paper's T_N as the
critic's start). The recorded teachers are its trained weights (adapters, where it is a LoRA), and are in every checkpoint. With
guidance the copy must learn the null condition too (``critic_null``): a recorded teacher is guided as the teacher is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.methods.base import Batch, Update
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles

Share = Annotated[float, Field(gt=0, lt=1)]


class DisBack(DistributionMatching):
    """Distribution backtracking: towards the recorded teachers in turn, the nearest first."""

    name: Literal["disback"] = "disback"  # type: ignore[assignment]
    like_teacher: ClassVar[Sequence[str]] = ("critic", "target")

    teachers: Annotated[int, Field(ge=2)] = 5  #: N: how often the degrading teacher is kept; the last one is the student's own score
    recording: Share = 0.1  #: of the training, while the student stands still
    backtracking: Share = 0.4  #: of the training, shared by T_{N−1} … T_1

    @model_validator(mode="after")
    def _goes_back(self) -> DisBack:
        if self.recording + self.backtracking >= 1:
            raise ValueError("recording and backtracking take all of the training: leave some for the teacher itself")
        if self.objective == "none":
            raise ValueError("objective none trains no critic, which is what records the path: use kl, sid, sim or expanded")
        if self.guidance_scale != 1.0 and not self.critic_null:
            raise ValueError("a recorded teacher is guided too, and must know the null condition: set critic_null to 0.1 or so")
        if self.gan is not None and self.gan.features == "teacher" and self.needs_ratio:
            raise ValueError("the density ratio would be read from the recorded teachers' features: set gan.features to critic or random")
        return self

    @property
    def roles(self) -> Sequence[str]:  # type: ignore[override]
        return ("student", "critic", "target")

    def target_decay(self, progress: float) -> float:
        return 1.0  # it is a recorded teacher, no average of the student

    def state_of(self, roles: Roles) -> dict[str, Tensor]:
        """How many are recorded, and the weights of T_1 … T_{N−1}; at first those of the teacher."""
        weights = roles.named_parameters("critic")
        kept = {_name(i, k): v.detach().clone() for i in range(1, self.teachers) for k, v in weights.items()}
        return {"recorded": torch.zeros((), dtype=torch.int64)} | kept

    def stage(self, progress: float) -> int:
        """The i of the teacher T_i that the student follows, N before it moves."""
        if progress < self.recording:
            return self.teachers
        gone = (progress - self.recording) / self.backtracking
        return max(0, self.teachers - 1 - int(gone * (self.teachers - 1)))

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        self._record(roles, batch.progress)
        stage = self.stage(batch.progress)
        if stage < self.teachers:
            if stage:
                _follow(roles, stage)
            yield from super().step(roles, batch)
            return
        for _ in range(self._critic_updates(roles)):  # the student's part of a step left out
            with torch.no_grad():
                sample = self._sample(roles, batch, fresh=True)
            yield from self._critic_update(roles, batch, sample)

    def _record(self, roles: Roles, progress: float) -> None:
        """Keep the degrading teacher where it is due: T_i after i/N of the recording."""
        due = min(self.teachers - 1, int(progress / self.recording * self.teachers))
        for i in range(int(roles.state["recorded"]) + 1, due + 1):
            for name, weight in roles.named_parameters("critic").items():
                roles.state[_name(i, name)].copy_(weight.detach())
            roles.state["recorded"].fill_(i)

    def _reference(self, roles: Roles, batch: Batch) -> tuple[Denoiser, Condition]:
        if self.stage(batch.progress) == 0:
            return roles.teacher, batch.condition
        assert roles.target is not None
        return roles.target, batch.condition


def _name(i: int, weight: str) -> str:
    return f"teacher_{i}/{weight}"


@torch.no_grad()
def _follow(roles: Roles, i: int) -> None:
    """The target role is T_i. (Set at each step: what a resumed run finds there does not matter, and it costs one copy.)"""
    for name, weight in roles.named_parameters("target").items():
        weight.copy_(roles.state[_name(i, name)])
