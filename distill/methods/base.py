"""What a distillation method is: its settings, the roles and data it needs, and its update rule as a generator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from distill.denoiser import Condition
from distill.experts import ByTime, Partition
from distill.roles import Roles
from distill.sampling import Sampler

#: A role, or several that one loss trains together.
RoleName = str | tuple[str, ...]
Update = tuple[RoleName, Tensor, Mapping[str, Tensor | float]]


@dataclass(frozen=True)
class PairsWanted:
    """Samples of the teacher that a method wants made before training, each with the noise that it came from."""

    count: int
    steps: int | None  #: of the teacher's own sampler; None: the recipe's teacher.steps
    guidance_scale: float
    paired: bool = True  #: whether it matters which noise a sample came from: the sampler may then draw none of its own


@dataclass(frozen=True)
class Pairs:
    """Some of them."""

    noise: Tensor  #: (batch, ...) unit variance, as ``Batch.noise``
    x0: Tensor  #: (batch, ...) where the teacher's sampler takes it
    condition: Condition
    group: Tensor | None = None  #: as in ``Batch``
    inputs: Sequence[Any] = ()


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``x0`` are real samples (or None where the method wants none); noise is drawn fresh."""

    noise: Tensor  #: (batch, ...) unit variance
    condition: Condition
    x0: Tensor | None = None
    progress: float = 0.0  #: how far training is, 0 to 1; curricula read this
    group: Tensor | None = None  #: (batch,) numbers of the conditions: samples of equal conditions share one
    inputs: Sequence[Any] = ()  #: the prompts or classes that the conditions say
    pairs: Pairs | None = None  #: as many samples of the teacher, where the method wants them


class Method(BaseModel):
    """Base of all methods. A method's fields are the schema of its section in the YAML: defaults live there and nowhere
    else. It has no behaviour to override but what is declared here, and methods do not inherit from methods."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    #: roles with weights of their own, beside the teacher: "student", and of "critic", "winner", "target"
    roles: ClassVar[Sequence[str]] = ("student",)
    #: those of them that keep the teacher's architecture where the student's is another
    like_teacher: ClassVar[Sequence[str]] = ("critic", "winner")

    def needs_images(self) -> bool:
        """Whether ``Batch.x0`` is used."""
        return False

    def needs_pairs(self) -> PairsWanted | None:
        """Which samples of the teacher ``Batch.pairs`` is drawn from; None for none."""
        return None

    def extra_inputs(self) -> list[Any]:
        """Prompts or classes beside the data's, whose conditions the method reads from ``Roles.extra``, in this order."""
        return []

    def needs_decoder(self) -> bool:
        """Whether ``Roles.decode`` is used."""
        return False

    def discriminator_features(self) -> tuple[str, tuple[str, ...]] | None:
        """(whose features are judged: a role's, "random", or an import path; names of layers), or None for no discriminator."""
        return None

    def guidance_embedding(self) -> int:
        """Width of the student's guidance embedding; 0 for none."""
        return 0

    def end_time(self) -> bool:
        """Whether the student is told where a jump ends, ``Condition.end``."""
        return False

    def experts(self) -> ByTime | Partition | None:
        """Of which networks the student is made, each for some noise levels or some conditions; None: of one."""
        return None

    def stretch(self, progress: float) -> tuple[float, float]:
        """Start and end of the part of the training, 0 to 1, in which learning rates warm up and decay now: all of it."""
        return 0.0, 1.0

    def target_decay(self, progress: float) -> float:
        """EMA decay of the target role after each student update; 0: the student's own weights; 1: the method itself sets it."""
        return 0.0

    def initial_state(self) -> dict[str, Tensor]:
        """Running statistics, changed in place by ``step`` through ``roles.state`` and checkpointed by the trainer."""
        return {}

    def state_of(self, roles: Roles) -> dict[str, Tensor]:
        """The same for what depends on the networks: weights that the method keeps. Equal on every process."""
        return {}

    def sampler(self) -> Sampler:
        """The settings that the student is to be sampled with."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its student samples")

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        """One training step: yields (role, loss, logs) in the paper's order.

        At each yield the trainer differentiates the loss in that role's parameters only, clips, steps, and resumes the
        generator. No graph crosses a yield.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update rule")


def strata(like: Tensor) -> Tensor:
    """u ~ U[0, 1], (batch,), float64; stratified over the batch (one draw in each of its equal parts, shuffled), which
    leaves every sample's law uniform and takes the noise level's share out of the gradient's variance."""
    n = len(like)
    return (torch.randperm(n, device=like.device) + torch.rand(n, dtype=torch.float64, device=like.device)) / n
