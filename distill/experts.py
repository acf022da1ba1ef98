"""A student of several networks, of which each sample asks one: by its noise level (Phased DMD), or by its condition (MSD).

The whole is a ``Denoiser``; its parameters are those of all networks, named 1.…, 2.…: checkpoints, averages and optimizers see one
student. The partition of conditions is a tree of half-spaces, made once: with K parts, split m of 1 … K − 1 lies between the parts
below m and the others,

    part ≥ m   ⇔   axis_m · v > threshold_m,        v the condition as a vector: a class's number, the mean of a prompt's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.call import REST, Layout
from distill.denoiser import BackboneDenoiser, Condition, Denoiser, Prediction
from distill.errors import UserError
from distill.teacher import Teacher

CPU = torch.device("cpu")  #: where a partition lies also while a plan's networks are built without memory
POWER_STEPS = 100  #: of the iteration that finds the direction in which prompts differ most


# -- what chooses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByTime:
    """Network k answers from starts[k] on, down to where the next one starts (whose level is the next one's own)."""

    starts: tuple[float, ...]  #: t, descending

    @property
    def count(self) -> int:
        return len(self.starts)

    def choose(self, t: Tensor, condition: Condition) -> Tensor:
        """(batch,) numbers of networks."""
        if t.is_meta:  # a plan knows no values: the last one, which runs after the others
            return torch.full((len(t),), self.count - 1, device=CPU)
        later = torch.tensor(self.starts[1:], dtype=torch.float64, device=t.device)
        return (t.double()[:, None] <= later + 1e-6).sum(1)

    def facts(self) -> dict[str, Any]:
        return {"starts": list(self.starts)}


@dataclass(frozen=True)
class Partition:
    """So many parts of all conditions, of equal size. Where they lie is read from the teacher's classes, or from the data."""

    count: int


@dataclass(frozen=True)
class ByCondition:
    """A partition: each condition belongs to one network."""

    path: str  #: of the backbone's argument that decides
    axes: Tensor  #: (K − 1, d)
    thresholds: Tensor  #: (K − 1,)
    examples: list[Any] = field(default_factory=list)  #: an input of each part; of prompts that nothing has been read of yet, none

    @property
    def count(self) -> int:
        return len(self.thresholds) + 1

    def choose(self, t: Tensor, condition: Condition) -> Tensor:
        """(batch,) numbers of networks."""
        return self.parts(as_vectors(condition.values[self.path]))

    def parts(self, v: Tensor) -> Tensor:
        """(batch, d) → (batch,): the part that each vector lies in."""
        if v.is_meta:  # a plan knows no values: equal shares
            return torch.arange(len(v), device=CPU) * self.count // len(v)
        axes, thresholds = self.axes.to(v), self.thresholds.to(v)
        low = torch.zeros(len(v), dtype=torch.int64, device=v.device)
        high = low + self.count
        while bool(((high - low) > 1).any()):
            split = (low + high) // 2
            index, is_open = (split - 1).clamp_min(0), high - low > 1
            beyond = (v * axes[index]).sum(1) > thresholds[index]
            low, high = torch.where(is_open & beyond, split, low), torch.where(is_open & ~beyond, split, high)
        return low

    def facts(self) -> dict[str, Any]:
        """As JSON; float32 survives the trip."""
        return {"path": self.path, "axes": self.axes.tolist(), "thresholds": self.thresholds.tolist(), "examples": self.examples}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> ByCondition:
        return cls(str(facts["path"]), torch.tensor(facts["axes"]), torch.tensor(facts["thresholds"]), list(facts["examples"]))

    @classmethod
    def of_classes(cls, path: str, classes: int, count: int) -> ByCondition:
        """Consecutive classes, in parts of equal size as nearly as can be: class c is part ⌊c K / classes⌋'s."""
        first = [-(-m * classes // count) for m in range(count)]
        return cls(path, torch.ones(count - 1, 1, device=CPU), torch.tensor([c - 0.5 for c in first[1:]], device=CPU), first)

    @classmethod
    def of_vectors(cls, path: str, vectors: Tensor, inputs: Sequence[Any], count: int) -> ByCondition:
        """Parts of equal size of what the (n, d) vectors stand for: each set is cut across the direction in which it spreads most,
        again and again. No chance is in it.

        Raises:
            UserError: if there are fewer different conditions than parts.
        """
        v = vectors.float().cpu()
        axes, thresholds = torch.zeros(count - 1, v.shape[1]), torch.zeros(count - 1)

        def cut(members: Tensor, low: int, high: int) -> None:
            if high - low < 2:
                return
            split = (low + high) // 2
            axis = widest(v[members])
            along = v[members] @ axis
            ordered, at = along.sort().values, round(len(members) * (split - low) / (high - low))
            if not 0 < at < len(members) or ordered[at - 1] == ordered[at]:
                raise UserError(f"method: the data's conditions cannot be split into {count} equal parts: they differ too little, or are too few")
            axes[split - 1], thresholds[split - 1] = axis, (ordered[at - 1] + ordered[at]) / 2
            beyond = along > thresholds[split - 1]
            cut(members[~beyond], low, split)
            cut(members[beyond], split, high)

        cut(torch.arange(len(v)), 0, count)
        made = cls(path, axes, thresholds)
        parts = made.parts(v)
        middles = [torch.nonzero(parts == k)[:, 0] for k in range(count)]
        typical = [members[(v[members] - v[members].mean(0)).square().sum(1).argmin()] for members in middles]
        return cls(path, axes, thresholds, [inputs[int(i)] for i in typical])


Route = ByTime | ByCondition


def as_vectors(value: Tensor | list[Any]) -> Tensor:
    """A condition's argument as (batch, d), float32: a number as it is, embeddings of tokens by their mean."""
    if isinstance(value, Tensor):
        return value.float().reshape(len(value), -1, 1 if value.dim() == 1 else value.shape[-1]).mean(1)
    return torch.stack([entry.float().reshape(-1, entry.shape[-1]).mean(0) for entry in value])


def widest(v: Tensor) -> Tensor:
    """(n, d) → (d,): the unit vector along which the points spread most; its largest entry is positive."""
    centred = v - v.mean(0)
    axis = centred[centred.square().sum(1).argmax()]
    for _ in range(POWER_STEPS):
        axis = nn.functional.normalize(centred.T @ (centred @ axis), dim=0)
    return axis * axis[axis.abs().argmax()].sign()


def find_route(wanted: ByTime | Partition | None, teacher: Teacher) -> Route | None:
    """What chooses among a student's networks. For prompts the partition is empty (all of them are the first network's) until
    ``of_prompts`` has seen the data.

    Raises:
        UserError: if the teacher is told nothing that could decide.
    """
    if wanted is None or isinstance(wanted, ByTime):
        return wanted
    layouts, told = teacher.denoiser.call.layouts, teacher.condition([teacher.placeholder()]).values
    named = {k: v for k, v in told.items() if k != REST and re.fullmatch(r"[\w.]+", k)}  # the exported pipeline has to find it, too
    plain = {k: v for k, v in named.items() if layouts.get(k, Layout()) in (Layout(), Layout("listed"))}
    if teacher.input_name == "class_labels" and teacher.classes is not None:
        label = next((k for k, v in plain.items() if isinstance(v, Tensor) and v.dim() == 1 and not v.is_floating_point()), None)
        if label is not None:
            if teacher.classes < wanted.count:
                raise UserError(f"method: {wanted.count} students, and the teacher has {teacher.classes} classes: set fewer")
            return ByCondition.of_classes(label, teacher.classes, wanted.count)
    embeddings = {k: v[0] for k, v in plain.items() if isinstance(v[0], Tensor) and v[0].is_floating_point() and v[0].dim()}
    if teacher.input_name != "prompt" or not embeddings:
        raise UserError("method: students for parts of the conditions need a teacher that is told classes or prompts")
    path = max(embeddings, key=lambda k: (embeddings[k].shape[-1], -embeddings[k].dim()))
    axes = torch.zeros(wanted.count - 1, embeddings[path].shape[-1], device=CPU)
    return ByCondition(path, axes, axes[:, 0])


# -- the networks -------------------------------------------------------------------------------------------------------


class Routed(Denoiser):
    """Several networks as one: each sample of a batch is answered by the one that its noise level or condition belongs to.

    Args:
        experts: of equal schedule and kind.
    """

    def __init__(self, experts: Sequence[Any], route: Route) -> None:
        self.experts: list[Any] = list(experts)
        self.route = route
        self.schedule, self.kind, self.guidance_rule = experts[0].schedule, experts[0].kind, experts[0].guidance_rule

    def component_names(self, component: str) -> list[str]:
        """Of the networks in an exported pipeline: unet, unet_2, …"""
        return [component if k == 0 else f"{component}_{k + 1}" for k in range(len(self.experts))]

    @property
    def dtype(self) -> torch.dtype:
        return self.experts[0].dtype  # type: ignore[no-any-return]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those of network k as k.NAME, k from 1."""
        return {f"{k}.{name}": p for k, expert in enumerate(self.experts, 1) for name, p in dict(expert.named_parameters()).items()}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t, told = t.to(x_t.device).expand(len(x_t)), condition or Condition()
        asked = self._asked(x_t, t, told)
        if len(asked) == 1:
            return self.experts[asked[0][0]].predict(x_t, t, told, features)  # type: ignore[no-any-return]
        answers = [self.experts[k].predict(x_t[i], t[i], told[i], features) for k, i in asked]
        together = _in_order(asked)
        extra = None if answers[0].extra is None else together([a.extra for a in answers])
        caught = {name: together([a.features[name] for a in answers]) for name in answers[0].features}
        return Prediction(together([a.value for a in answers]), self.kind, x_t, t, self.schedule, caught, extra)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition | None, names: Sequence[str]) -> Mapping[str, Tensor]:
        t, told = t.to(x_t.device).expand(len(x_t)), condition or Condition()
        asked = self._asked(x_t, t, told)
        answers = [self.experts[k].features(x_t[i], t[i], told[i], names) for k, i in asked]
        together = _in_order(asked)
        return {name: together([a[name] for a in answers]) for name in answers[0]}

    def _asked(self, x_t: Tensor, t: Tensor, condition: Condition) -> list[tuple[int, Tensor]]:
        """(network, indices of its samples) for the networks that have any."""
        chosen = self.route.choose(t, condition).to(CPU if x_t.is_meta else x_t.device)
        return [(k, torch.nonzero(chosen == k)[:, 0]) for k in chosen.unique().tolist()]


def _in_order(asked: Sequence[tuple[int, Tensor]]) -> Callable[[list[Tensor]], Tensor]:
    """Joins what was answered part by part, in the order of the batch."""
    back = torch.cat([indices for _, indices in asked]).argsort()
    return lambda parts: torch.cat(parts)[back.to(CPU if parts[0].is_meta else parts[0].device)]


def networks_of(role: Any) -> list[BackboneDenoiser]:
    """The networks of a role: several, one, or none where it is no backbone."""
    experts = role.experts if isinstance(role, Routed) else [role]
    return [network for network in experts if isinstance(network, BackboneDenoiser)]


def of_prompts(route: Route | None, told: Callable[[Tensor], Any], entries: int, most: int = 4096) -> ByCondition | None:
    """The partition by the conditions of the data; None where the route needs none.

    Args:
        told: indices of entries of the data → their ``condition`` and ``inputs`` (``TrainingData.told``).
        most: entries that are looked at, evenly spaced.
    """
    if not isinstance(route, ByCondition) or route.examples:
        return None
    chosen = torch.linspace(0, entries - 1, min(entries, most)).round().long().unique()
    vectors, inputs = [], []
    for some in chosen.split(64):
        drawn = told(some)
        vectors.append(as_vectors(drawn.condition.values[route.path]).cpu())
        inputs += drawn.inputs
    different = list({given: i for i, given in reversed(list(enumerate(inputs)))}.values())[::-1]
    return ByCondition.of_vectors(route.path, torch.cat(vectors)[different], [inputs[i] for i in different], route.count)
