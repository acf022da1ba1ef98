"""A reward's stand-in in latent space that is learnt online (Li et al. 2024, RG-LCD, arXiv 2403.11027, sec. 4.2).

The student climbs the stand-in, heads on the frozen teacher's features of its sample, and not the expert itself: no gradient goes through a decoder,
and what is a weakness of the expert alone (high frequencies that please it) is none of the stand-in's. After each student update it
learns to prefer what the expert prefers among three samples of each condition, the student's, its target and a real one:

    L_proxy = mean over pairs i < j of KL( softmax[e_i, e_j]/τ ‖ softmax[p_i, p_j] ),      L_student −= weight · p(x)

so that it is right up to a constant for each condition. The expert need not be differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from distill.denoiser import Condition
from distill.errors import UserError
from distill.imports import import_object
from distill.roles import Roles


class ProxyReward(BaseModel):
    """The expert and its stand-in, which takes the discriminator's place (and its optimizer's settings)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    function: str  #: the expert, module:function, (images, inputs) → (batch,) scores, the larger the better
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0  #: τ of the expert's scores
    layers: Annotated[list[str], Field(min_length=1)] = ["mid_block"]  #: of the teacher's backbone, whose features are judged
    level: Annotated[float, Field(gt=0, lt=1)] = 0.05  #: t of its input: the teacher knows clean samples only through a little noise

    @field_validator("function")
    @classmethod
    def _known(cls, value: str) -> str:
        import_object(value)
        return value

    def score(self, roles: Roles, x: Tensor, condition: Condition) -> Tensor:
        """(batch,) of clean samples; differentiable in them."""
        assert roles.discriminator is not None
        t = torch.full((len(x),), self.level, dtype=torch.float64, device=x.device)
        x_t = roles.schedule.add_noise(x, torch.randn_like(x), t)
        return roles.discriminator(roles.teacher.features(x_t, t, condition, tuple(self.layers))).mean(1)

    @torch.no_grad()
    def expert(self, roles: Roles, x: Tensor, inputs: Sequence[Any]) -> Tensor:
        """(batch,) what it is to imitate."""
        assert roles.decode is not None
        judge: Callable[..., Tensor] = import_object(self.function)
        scores = torch.as_tensor(judge(roles.decode(x), inputs), device=x.device)
        if scores.shape != (len(x),):
            raise UserError(f"method.proxy.function: {self.function} gave {tuple(scores.shape)} for {len(x)} images: one score for each is wanted")
        return scores.float() / self.temperature

    def loss(self, roles: Roles, samples: Sequence[Tensor], condition: Condition, inputs: Sequence[Any]) -> Tensor:
        """Of the stand-in, on several samples of each condition."""
        mine = [self.score(roles, x, condition) for x in samples]
        experts = [self.expert(roles, x, inputs) for x in samples]
        pairs = list(combinations(range(len(samples)), 2))
        return torch.stack([preference_distance(experts[i] - experts[j], mine[i] - mine[j]) for i, j in pairs]).mean()


def preference_distance(wanted: Tensor, mine: Tensor) -> Tensor:
    """KL between two coins of these log-odds, mean over the batch."""
    p = torch.sigmoid(wanted)
    return (p * (F.logsigmoid(wanted) - F.logsigmoid(mine)) + (1 - p) * (F.logsigmoid(-wanted) - F.logsigmoid(-mine))).mean()
