"""MSD, multi-student distillation: several students, each for a part of the conditions; a sample asks one of them.

    Song et al. 2025, "Multi-student Diffusion Distillation for Better One-step Generators", ICML, arXiv 2410.23274

    K disjoint parts of equal size:  classes in their order, or prompts by their embeddings (``experts.py``)
    stage 0   (students of another architecture)  teacher score matching at noised samples:  E_t ‖D_S(x_t, t, c) − D_T(x_t, t, c)‖²
    then      the engine's own step; each sample of a batch trains the student that its condition belongs to

Every student answers as fast as one, and has less to know: smaller ones become good enough. One critic, told the condition, follows
all of them: it learns q(x | c), whichever student a condition belongs to. (The paper has a critic for each.) The pairs of a
regression term are shared: each student learns all of them, also those of the others' conditions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.experts import ByTime, Partition
from distill.guidance import Guided
from distill.matching.times import draw_times
from distill.methods.base import Batch, Update
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles


class MSD(DistributionMatching):
    """Multi-student distillation. One student is the engine as it is."""

    name: Literal["msd"] = "msd"  # type: ignore[assignment]

    students: Annotated[int, Field(ge=1)] = 2  #: each for an equal part of the conditions
    #: share of the training in which they learn the teacher's answers at noised samples first; for students of another architecture,
    #: which know nothing of noise levels yet. Needs real samples, or real: teacher
    teacher_matching: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def experts(self) -> ByTime | Partition | None:
        return Partition(self.students) if self.students > 1 else None

    @property
    def looks_at_real(self) -> bool:
        return self.teacher_matching > 0 or super().looks_at_real

    def stretch(self, progress: float) -> tuple[float, float]:
        return (0.0, self.teacher_matching) if progress < self.teacher_matching else (self.teacher_matching, 1.0)

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        if batch.progress >= self.teacher_matching:
            yield from super().step(roles, batch)
            return
        loss = self._teacher_matching(roles, self._with_real(batch))
        yield "student", loss, {"teacher_matching": loss.detach()}

    def _teacher_matching(self, roles: Roles, batch: Batch) -> Tensor:
        """In the student's own parameterisation, mean over elements; the teacher guided as the student is to answer."""
        assert batch.x0 is not None
        t = draw_times(self.critic_times, batch.x0, roles.schedule, batch.progress)
        x_t = roles.schedule.add_noise(batch.x0, torch.randn_like(batch.x0), t)
        with torch.no_grad():
            wanted = Guided(roles.teacher, self._mean_guidance).predict(x_t, t, batch.condition).as_kind(roles.student.kind)
        return (roles.student.predict(x_t, t, batch.condition).value - wanted).square().mean()
