"""Auxiliary terms of the student's loss, each usable with any distribution-matching method:

    terms:
      - {kind: regression, weight: 0.25, metric: lpips}                       pairs of the teacher's (DMD)
      - {kind: embedding, weight: 1.0}                                        moments of random features (EL)
      - {kind: drifting, layers: [mid_block], coverage: 1.0}                  drift in the teacher's features
      - {kind: denoising, weight: 0.1}                                        the student as a denoiser of real data
      - {kind: clip, weight: 0.1, clamp: 0.35, decay: linear}                 agreement with the prompt (SwiftBrush v2)
      - {kind: reward, function: "my_module:score", weight: 0.1, clamp: 0.35}
      - {kind: "my_module:MyTerm", weight: 0.5}

A term is a class with settings and one function; see docs/methods/extend.md for one of your own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from torch import Tensor

from distill.denoiser import Condition
from distill.errors import UserError
from distill.experts import Routed
from distill.imports import import_object
from distill.losses.drifting import Kernel, coverage_loss, drifting_loss
from distill.losses.metrics import find_distance, known_distance
from distill.matching.critic import denoising_loss
from distill.matching.rollout import Sample
from distill.matching.times import TimeLaw, Times, draw_times
from distill.methods.base import Batch
from distill.roles import Roles


@dataclass(frozen=True)
class Context:
    """What a term is computed from."""

    roles: Roles
    batch: Batch
    sample: Sample  #: of the student, with gradient
    start: float = 1.0  #: the first time of the student's ladder


class Term(BaseModel, ABC):
    """One auxiliary loss."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    decay: Literal["constant", "linear"] = "constant"  #: of the weight, to zero at the end of training

    needs_images: ClassVar[bool] = False  #: reads ``batch.x0``
    needs_pairs: ClassVar[bool] = False  #: reads ``batch.pairs``

    @property
    def needs_decoder(self) -> bool:
        """Whether it reads ``roles.decode``."""
        return False

    @abstractmethod
    def loss(self, context: Context) -> Tensor:
        """A scalar, differentiable in the student."""

    def weighted(self, context: Context) -> tuple[Tensor, Tensor]:
        """(weight × loss, loss without gradient)."""
        value = self.loss(context)
        strength = self.weight * (1 - context.batch.progress if self.decay == "linear" else 1.0)
        return strength * value, value.detach()


class Regression(Term):
    """Distance of the student's first prediction to the teacher's own sample from the same noise (DMD: Yin et al. 2024, eq. 9).

    Several samples of the teacher share no noise: unlike a score difference, regression leaves none of its modes out.
    """

    kind: Literal["regression"] = "regression"
    weight: Annotated[float, Field(gt=0)] = 0.25
    metric: Annotated[str, AfterValidator(known_distance)] = "pseudo_huber"  #: l2, pseudo_huber, pseudo_huber_elementwise, lpips, or your own, module:function
    decoded: bool = False  #: compare decoded images (as lpips always does), not samples

    needs_pairs: ClassVar[bool] = True

    @property
    def needs_decoder(self) -> bool:
        return self.decoded or self.metric == "lpips"

    def loss(self, context: Context) -> Tensor:
        roles, pairs = context.roles, context.batch.pairs
        assert pairs is not None
        start = torch.full((len(pairs.noise),), context.start, dtype=torch.float64, device=pairs.noise.device)
        noise, wanted, decode = pairs.noise * roles.schedule.initial_scale, pairs.x0.float(), roles.decode if self.needs_decoder else None
        if decode is not None:
            with torch.no_grad():
                wanted = decode(wanted)
        # Students for parts of the conditions (MSD) all learn every pair: those of its own part alone make a student lose modes.
        networks = roles.student.experts if isinstance(roles.student, Routed) else [roles.student]
        made = (network(noise, start, pairs.condition) for network in networks)
        distances = [find_distance(self.metric)(x if decode is None else decode(x), wanted).mean() for x in made]
        return torch.stack(distances).mean()


class Denoising(Term):
    """The student as a denoiser of real data: ordinary denoising score matching of its network, which keeps it a diffusion model."""

    kind: Literal["denoising"] = "denoising"
    times: TimeLaw = (0.001, 1.0)

    needs_images: ClassVar[bool] = True

    def loss(self, context: Context) -> Tensor:
        roles, batch = context.roles, context.batch
        assert batch.x0 is not None
        t = draw_times(self.times, batch.x0, roles.schedule, batch.progress)
        return denoising_loss(roles.student, batch.x0, t, batch.condition)


class Embedding(Term):
    """Embedding loss: the squared maximum mean discrepancy of student and real samples in the features of random networks that
    are drawn anew at each step (Ying et al. 2026, EL; as in distribution matching for dataset condensation), unbiased, and by
    condition where several samples share one."""

    kind: Literal["embedding"] = "embedding"
    networks: Annotated[int, Field(ge=1)] = 1  #: drawn per step; their mean
    width: Annotated[int, Field(ge=8)] = 128
    depth: Annotated[int, Field(ge=1, le=4)] = 3
    by_condition: bool = True  #: compare only samples of equal conditions

    needs_images: ClassVar[bool] = True

    def loss(self, context: Context) -> Tensor:
        from distill.losses.embedding import random_embedding, squared_discrepancy

        x, real = context.sample.x0, context.batch.x0
        assert real is not None
        groups, total = context.batch.group if self.by_condition else None, x.new_zeros(())
        for _ in range(self.networks):
            embed = random_embedding(x, self.width, self.depth, seed=int(torch.randint(2**31, ())))
            total = total + squared_discrepancy(embed(x), embed(real), groups)
        return total / self.networks


class Drifting(Term):
    """Drift of the student's samples in the frozen teacher's hidden features, towards real ones and away from one another, and a loss
    on what they leave out (Teacher-Feature Drifting: Zhang, Li et al. 2026; see losses/drifting.py). No critic is needed.

    Student and real samples are noised to one level, a small one: the teacher knows clean images only through it. Layers at several
    depths do better than deep ones alone.
    """

    kind: Literal["drifting"] = "drifting"
    layers: Annotated[list[str], Field(min_length=1)] = ["mid_block"]  #: module names inside the teacher's backbone
    #: noise level of the features: sigma/alpha around 0.1
    times: TimeLaw = Times(law="log_sigma", mean=-2.3, std=0.5)
    radii: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [0.02, 0.05, 0.2]  #: of the kernel, in mean distances of features
    kernel: Kernel = "exponential"
    columns: bool = True  #: normalise the weights over queries, too
    pool: Annotated[int, Field(ge=1)] = 4  #: feature maps are averaged down to so many places a side (tokens to its square)
    coverage: Annotated[float, Field(ge=0)] = 1.0  #: weight of the mode-coverage loss; 0 for none
    margin: Annotated[float, Field(gt=0, le=1)] = 0.5  #: share of a region's mass that the student has to keep
    bandwidth: Annotated[float, Field(gt=0)] = 0.25  #: of a region, in median distances of real features
    by_condition: bool = True  #: only samples of equal conditions interact

    needs_images: ClassVar[bool] = True

    def loss(self, context: Context) -> Tensor:
        roles, batch, x = context.roles, context.batch, context.sample.x0
        assert batch.x0 is not None
        t = draw_times(self.times, x[:1], roles.schedule, batch.progress).expand(len(x))
        generated = self.features(roles, x, t, batch.condition)  # through the teacher: its weights are frozen, its input is not
        with torch.no_grad():
            real = self.features(roles, batch.x0, t, batch.condition)
        total, count = x.new_zeros(()), 0
        for members in _groups(batch.group if self.by_condition else None, len(x), x.device):
            if len(members) < 2:
                continue
            count += len(members)
            for g, r in zip(generated, real, strict=True):
                part = drifting_loss(g[members], r[members], self.radii, self.kernel, self.columns)
                if self.coverage:
                    part = part + self.coverage * coverage_loss(g[members], r[members], self.margin, self.bandwidth)
                total = total + len(members) * part
        if not count:
            raise UserError("term drifting: no two samples of a batch have the same condition: set by_condition: false, or a larger trainer.batch_size")
        return total / count

    def features(self, roles: Roles, x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """(batch, d) of each layer, pooled, float32."""
        x_t = roles.schedule.add_noise(x, torch.randn_like(x), t)
        found = roles.teacher.features(x_t, t, condition, tuple(self.layers))
        return [_pooled(found[name].float(), self.pool).flatten(1) for name in self.layers]


def _pooled(f: Tensor, places: int) -> Tensor:
    """A feature map averaged down to so many places a side, or tokens to as many in all; anything else as it is."""
    if f.dim() == 4:
        return F.adaptive_avg_pool2d(f, min(places, *f.shape[2:]))
    return F.adaptive_avg_pool1d(f.transpose(1, 2), min(places**2, f.shape[1])) if f.dim() == 3 else f


def _groups(group: Tensor | None, count: int, device: torch.device) -> list[Tensor]:
    """Indices of the samples of equal conditions."""
    if group is None:
        return [torch.arange(count, device=device)]
    return [torch.nonzero(group == number)[:, 0] for number in group.unique()]


class Reward(Term):
    """Minus a differentiable reward, (images, inputs) → (batch,), by import path: images (batch, channels, height, width) in [0, 1].

    With ``clamp`` a sample that scores more than it has no gradient left: the reward is satisfied, not maximised (SwiftBrush v2:
    Dao et al. 2024).
    """

    kind: Literal["reward"] = "reward"
    function: str  #: module:function
    clamp: float | None = None

    @property
    def needs_decoder(self) -> bool:
        return True

    def loss(self, context: Context) -> Tensor:
        assert context.roles.decode is not None
        score: Callable[..., Tensor] = import_object(self.function)
        value = score(context.roles.decode(context.sample.x0), context.batch.inputs)
        return unsatisfied(value, self.clamp)


class Clip(Term):
    """Agreement of the decoded samples with their prompts: max(0, clamp − cosine of the CLIP embeddings) (SwiftBrush v2: Dao et al.
    2024, sec. 4.2). Without the clamp a student comes to please CLIP and no one else."""

    kind: Literal["clip"] = "clip"
    model: str = "ViT-B-32"  #: of OpenCLIP
    pretrained: str = "laion2b_s34b_b79k"  #: a tag of its weights, or a safetensors file
    clamp: float | None = 0.35  #: cosine above which a sample has no gradient; null: maximise it

    @property
    def needs_decoder(self) -> bool:
        return True

    def loss(self, context: Context) -> Tensor:
        from distill.losses.perceptual import clip_similarity

        assert context.roles.decode is not None
        return unsatisfied(clip_similarity(context.roles.decode(context.sample.x0), context.batch.inputs, self.model, self.pretrained), self.clamp)


def unsatisfied(value: Tensor, clamp: float | None) -> Tensor:
    """mean max(0, clamp − value), or −mean value: (batch,) → scalar."""
    return (-value if clamp is None else (clamp - value).clamp_min(0)).mean()


KINDS: dict[str, type[Term]] = {
    "regression": Regression, "denoising": Denoising, "embedding": Embedding, "drifting": Drifting, "clip": Clip, "reward": Reward,
}


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
