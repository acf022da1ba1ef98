"""Auxiliary terms of the student's loss, each usable with any distribution-matching method:

    terms:
      - {kind: embedding, weight: 1.0}
      - {kind: reward, function: "my_module:score", weight: 0.1, clamp: 0.35}
      - {kind: "my_module:MyTerm", weight: 0.5}

A term is a class with settings and one function; see docs/methods.md for one of your own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from torch import Tensor

from distill.imports import import_object
from distill.matching.rollout import Sample
from distill.methods.base import Batch
from distill.roles import Roles


@dataclass(frozen=True)
class Context:
    """What a term is computed from."""

    roles: Roles
    batch: Batch
    sample: Sample  #: of the student, with gradient


class Term(BaseModel, ABC):
    """One auxiliary loss."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    decay: Literal["constant", "linear"] = "constant"  #: of the weight, to zero at the end of training

    needs_images: ClassVar[bool] = False  #: reads ``batch.x0``
    needs_pairs: ClassVar[bool] = False  #: reads ``batch.pairs``
    needs_decoder: ClassVar[bool] = False  #: reads ``roles.decode``

    @abstractmethod
    def loss(self, context: Context) -> Tensor:
        """A scalar, differentiable in the student."""

    def weighted(self, context: Context) -> tuple[Tensor, Tensor]:
        """(weight × loss, loss without gradient)."""
        value = self.loss(context)
        strength = self.weight * (1 - context.batch.progress if self.decay == "linear" else 1.0)
        return strength * value, value.detach()


class Embedding(Term):
    """Embedding loss: the squared maximum mean discrepancy of student and real samples in the features of a random network that
    is drawn anew at each step (Ying et al. 2026, EL; as in distribution matching for dataset condensation), unbiased, and by
    condition where several samples share one."""

    kind: Literal["embedding"] = "embedding"
    width: Annotated[int, Field(ge=8)] = 128
    depth: Annotated[int, Field(ge=1, le=4)] = 3
    by_condition: bool = True  #: compare only samples of equal conditions

    needs_images: ClassVar[bool] = True

    def loss(self, context: Context) -> Tensor:
        from distill.losses.embedding import random_embedding, squared_discrepancy

        x, real = context.sample.x0, context.batch.x0
        assert real is not None
        embed = random_embedding(x, self.width, self.depth, seed=int(torch.randint(2**31, ())))
        groups = context.batch.group if self.by_condition else None
        return squared_discrepancy(embed(x), embed(real), groups)


class Reward(Term):
    """Minus a differentiable reward, (images, inputs) → (batch,), by import path: images (batch, channels, height, width) in [0, 1].

    With ``clamp`` a sample that scores more than it has no gradient left: the reward is satisfied, not maximised (SwiftBrush v2:
    Dao et al. 2024).
    """

    kind: Literal["reward"] = "reward"
    function: str  #: module:function
    clamp: float | None = None

    needs_decoder: ClassVar[bool] = True

    def loss(self, context: Context) -> Tensor:
        assert context.roles.decode is not None
        score: Callable[..., Tensor] = import_object(self.function)
        value = score(context.roles.decode(context.sample.x0), context.batch.inputs)
        return (-value if self.clamp is None else (self.clamp - value).clamp_min(0)).mean()


KINDS: dict[str, type[Term]] = {"embedding": Embedding, "reward": Reward}


def _made(value: Any) -> Any:
    """A term from its YAML section."""
    if isinstance(value, Term) or not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"a term needs a kind: {', '.join(KINDS)}, or the import path of your own, module:Class")
    found = KINDS[kind] if kind in KINDS else import_object(kind) if ":" in kind else None
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise ValueError(f"there is no term {kind!r}; known: {', '.join(KINDS)}, or the import path of your own subclass of Term")
    return found.model_validate(value)


AnyTerm = Annotated[SerializeAsAny[Term], BeforeValidator(_made)]
