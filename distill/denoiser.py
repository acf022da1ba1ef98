"""One contract for everything that denoises: ``D(x_t, t, condition) -> x0`` in float32.

Teacher, critic, student at t, guided teacher and the exact Gaussian teachers of ``analytic.py`` are interchangeable.
Conditions are opaque to methods: they come from the batch and go into a denoiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distill.call import Call, Values, unflatten
from distill.masters import Masters
from distill.schedule import Kind, NoiseSchedule, double


@dataclass(frozen=True)
class Condition:
    """What a backbone is told beside (x_t, t): arguments by path, one entry per sample, and the same for "nothing told".

    An argument is a (batch, ...) tensor, or a list with one entry per sample where entries differ in shape or are no
    tensors. ``values`` may be empty (an unconditional teacher); ``null`` is None where the teacher has no null condition.
    ``guidance`` is a guidance scale per sample, (batch,): a guided teacher uses it in place of its own fixed scale, and
    a backbone with a guidance embedding is told it. ``end`` is the time s, (batch,), that a jump from t is to end at: a
    network with an embedding of the end time is told it, every other one takes no notice.
    """

    values: Values = field(default_factory=dict)
    null: Values | None = None
    guidance: Tensor | None = None
    end: Tensor | None = None

    def _map(self, f: Callable[[Any], Any], g: Callable[[list[Any]], list[Any]]) -> Condition:
        def over(values: Values) -> dict[str, Any]:
            return {k: f(v) if isinstance(v, Tensor) else g(v) for k, v in values.items()}

        guidance, end = (None if v is None else f(v) for v in (self.guidance, self.end))
        return Condition(over(self.values), None if self.null is None else over(self.null), guidance, end)

    def __getitem__(self, index: Any) -> Condition:
        """The samples of a slice, or of a tensor or sequence of indices."""

        def chosen(entries: list[Any]) -> list[Any]:
            return entries[index] if isinstance(index, slice) else [entries[int(i)] for i in index]

        return self._map(lambda v: v[index], chosen)

    def to(self, device: torch.device | str) -> Condition:
        return self._map(lambda v: v.to(device), lambda entries: [_moved(e, device) for e in entries])

    def with_guidance(self, guidance: Tensor) -> Condition:
        return replace(self, guidance=guidance)

    def without_guidance(self) -> Condition:
        return replace(self, guidance=None)

    def ending(self, end: Tensor) -> Condition:
        """The same, told the time at which the jump ends."""
        return replace(self, end=end)

    def unconditional(self) -> Condition:
        """The null condition for every sample."""
        if self.null is None:
            raise ValueError("this teacher has no null condition")
        return Condition(self.null, self.null, self.guidance, self.end)

    def dropped(self, mask: Tensor) -> Condition:
        """The null condition where the (batch,) mask is true."""
        if self.null is None:
            raise ValueError("this teacher has no null condition")
        return self.where(~mask, Condition(self.null))

    def where(self, mask: Tensor, other: Condition) -> Condition:
        """This condition where the (batch,) mask is true, what the other one says elsewhere. The null condition stays."""

        def mixed(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.shape == theirs.shape:
                return torch.where(mask.to(mine.device).reshape((-1,) + (1,) * (mine.dim() - 1)), mine, theirs)
            return [a if m else b for a, b, m in zip(mine, theirs, mask.tolist(), strict=True)]

        return Condition({k: mixed(v, other.values[k]) for k, v in self.values.items()}, self.null, self.guidance, self.end)


def cat(conditions: Sequence[Condition]) -> Condition:
    """Concatenate along the batch. Tensors whose lengths differ become a list of one per sample."""
    first = conditions[0]

    def join(parts: Sequence[Values]) -> dict[str, Any]:
        return {k: _joined([p[k] for p in parts]) for k in parts[0]}

    nulls = [c.null for c in conditions if c.null is not None]
    guidances = [c.guidance for c in conditions if c.guidance is not None]
    ends = [c.end for c in conditions if c.end is not None]
    return Condition(
        join([c.values for c in conditions]),
        None if first.null is None else join(nulls),
        None if first.guidance is None else torch.cat(guidances),
        None if first.end is None else torch.cat(ends),
    )


def _joined(parts: Sequence[Tensor | list[Any]]) -> Tensor | list[Any]:
    tensors = [p for p in parts if isinstance(p, Tensor)]
    if len(tensors) == len(parts) and len({t.shape[1:] for t in tensors}) == 1:
        return torch.cat(tensors)
    return [entry for part in parts for entry in part]


def same_shapes(a: Condition, b: Condition) -> bool:
    """Whether one call of a backbone can take both."""

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape[1:]
        return [tuple(e.shape) if isinstance(e, Tensor) else e for e in value]

    return all(shape(v) == shape(b.values[k]) for k, v in a.values.items())


def _moved(value: Any, device: torch.device | str) -> Any:
    return pytree.tree_map_only(Tensor, lambda v: v.to(device), value)


class Prediction:
    """What a network said at (x_t, t), readable as any kind; each reading converts once, in float64, from the original."""

    def __init__(
        self, value: Tensor, kind: Kind, x_t: Tensor, t: Tensor, schedule: NoiseSchedule,
        features: Mapping[str, Tensor] | None = None, extra: Tensor | None = None,
    ) -> None:
        self.value, self.kind, self.x_t, self.t, self.schedule = value, kind, x_t, t, schedule
        self.features: Mapping[str, Tensor] = features or {}
        self.extra = extra  #: channels beside the prediction, a learnt variance: some schedulers want them

    def as_kind(self, kind: Kind) -> Tensor:
        """(batch, ...) in float32, or in float64 where x_t is."""
        dtype = torch.float64 if self.x_t.dtype == torch.float64 else torch.float32
        return self.schedule.convert(self.value, self.x_t, self.t, self.kind, kind).to(dtype)

    @property
    def x0(self) -> Tensor:
        return self.as_kind("x0")

    @property
    def eps(self) -> Tensor:
        return self.as_kind("eps")

    @property
    def v(self) -> Tensor:
        return self.as_kind("v")

    @property
    def f(self) -> Tensor:
        return self.as_kind("f")

    @property
    def velocity(self) -> Tensor:
        return self.as_kind("velocity")

    @property
    def score(self) -> Tensor:
        return self.as_kind("score")


class Denoiser(ABC):
    """``D(x_t, t, condition) -> x0``; ``predict`` for the other kinds and for hidden features."""

    schedule: NoiseSchedule
    kind: Kind  #: the native parameterisation, in which losses on a critic are taken
    guidance_rule: str = "plain"  #: how its pipeline combines a conditional and an unconditional answer, see guidance.py

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        """Evaluate at x_t (batch, ...) and t (batch,) or scalar.

        Args:
            features: names of hidden layers whose outputs are wanted in ``Prediction.features``.
        """

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.predict(x_t, t, condition).x0

    def features(self, x_t: Tensor, t: Tensor, condition: Condition | None, names: Sequence[str]) -> Mapping[str, Tensor]:
        """The hidden features alone; a backbone stops as soon as it has them."""
        return self.predict(x_t, t, condition, names).features

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that training changes."""
        return ()


@dataclass(frozen=True)
class Companion:
    """A network that helps the backbone at each step and is never trained: a ControlNet, an adapter.

    Its conditions lie beside the backbone's under its own name, ``controlnet:controlnet_cond``.
    """

    name: str
    module: nn.Module
    call: Call
    feeds: Mapping[str, int]  #: the backbone's argument → which tensor of its answer

    def outputs(self, x_t: Tensor, time: Tensor, values: Values, dtype: torch.dtype) -> dict[str, Tensor]:
        """What it tells the backbone, by the backbone's arguments."""
        own = {k.removeprefix(f"{self.name}:"): v for k, v in values.items() if k.startswith(f"{self.name}:")}
        answer = self.module(**unflatten(self.call.arguments(x_t, time, own, dtype)))
        leaves = [v for v in pytree.tree_leaves(answer) if isinstance(v, Tensor)]
        return {path: leaves[i] for path, i in self.feeds.items()}


class BackboneDenoiser(Denoiser):
    """A diffusers backbone with its schedule and calling convention.

    Args:
        use: entered around each forward; selects the adapter of this role on a shared backbone.
        trained: name → parameter of what training changes; all of the backbone's where None.
        companions: networks that run before each call and whose answers go into it.
        masters: keeps what is trained in float32 where the network computes in half precision.
        end_time: an embedding that tells the backbone ``Condition.end``, attached to it (``two_time.py``); without one told, s = t.
    """

    def __init__(
        self, backbone: nn.Module, schedule: NoiseSchedule, kind: Kind, call: Call,
        use: Callable[[], AbstractContextManager[None]] = nullcontext,
        trained: Mapping[str, nn.Parameter] | None = None, companions: Sequence[Companion] = (), masters: Masters | None = None,
        end_time: Any = None,
    ) -> None:
        self.companions, self.masters, self.end_time = companions, masters, end_time
        self.backbone, self.schedule, self.kind, self.call, self.use = backbone, schedule, kind, call, use
        self._trained = trained
        # Quantised weights are integers: the dtype is that of the others.
        with nullcontext() if masters is None else masters.using():
            self.dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by the names that the weights have on disk."""
        return dict(self.backbone.named_parameters() if self._trained is None else self._trained)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t, condition = t.to(x_t.device).expand(len(x_t)), condition or Condition()
        if len(x_t) > 1 and self.call.apart(condition.values):
            return _together([self.predict(*one, features) for one in _singles(x_t, t, condition)], x_t, t)
        with _catching(self.backbone, features) as caught, self.use(), self._told_end(t, condition):
            output = self.backbone(**self._arguments(x_t, t, condition))
        value, extra = self.call.answer(output, len(x_t)), None
        if value.dim() == x_t.dim() and value.shape[1] > x_t.shape[1]:
            value, extra = value.split([x_t.shape[1], value.shape[1] - x_t.shape[1]], 1)
        return Prediction(value, self.kind, x_t, t, self.schedule, self._batched(caught), extra)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition | None, names: Sequence[str]) -> Mapping[str, Tensor]:
        t, condition = t.to(x_t.device).expand(len(x_t)), condition or Condition()
        if len(x_t) > 1 and self.call.apart(condition.values):
            return _each_cat([self.features(*one, names) for one in _singles(x_t, t, condition)])
        with _catching(self.backbone, names, stop=True) as caught, self.use(), self._told_end(t, condition):
            self.backbone(**self._arguments(x_t, t, condition))
        return self._batched(caught)

    def _told_end(self, t: Tensor, told: Condition) -> AbstractContextManager[None]:
        """The backbone told the way from t to the end, where it can be."""
        if self.end_time is None:
            return nullcontext()
        way = torch.zeros_like(t) if told.end is None else double(t) - double(told.end.to(t.device))
        context: AbstractContextManager[None] = self.end_time.using(self.end_time(way))
        return context

    def _batched(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """With the batch in front, where a network takes one sample and knows no batch: (tokens, channels)."""
        return {k: v if len(v) == 1 else v.unsqueeze(0) for k, v in features.items()} if self.call.alone else features

    def _arguments(self, x_t: Tensor, t: Tensor, told: Condition) -> dict[str, Any]:
        flat = self.call.arguments(x_t, self.schedule.model_time(t), told.values, self.dtype)
        scale = told.guidance if told.guidance is not None else torch.ones(len(x_t), device=x_t.device)
        if self.call.guidance is not None:
            config: Any = self.backbone.config
            flat[self.call.guidance] = guidance_embedding(scale, int(config.time_cond_proj_dim)).to(self.dtype)
        if self.call.embedded is not None:
            path, affine = self.call.embedded
            flat[path] = affine(scale).to(self.dtype)
        for companion in self.companions:
            flat |= companion.outputs(x_t, self.schedule.model_time(t), told.values, self.dtype)
        return unflatten(flat)


def _singles(x_t: Tensor, t: Tensor, condition: Condition) -> Iterator[tuple[Tensor, Tensor, Condition]]:
    """A batch as batches of one."""
    for i in range(len(x_t)):
        yield x_t[i : i + 1], t[i : i + 1], condition[i : i + 1]


def _together(singles: Sequence[Prediction], x_t: Tensor, t: Tensor) -> Prediction:
    """What was predicted for each sample of a batch by itself."""
    first = singles[0]
    extra = None if first.extra is None else torch.cat([p.extra for p in singles if p.extra is not None])
    value = torch.cat([p.value for p in singles])
    return Prediction(value, first.kind, x_t, t, first.schedule, _each_cat([p.features for p in singles]), extra)


def _each_cat(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of 1000 (w − 1), (batch,) → (batch, width): what diffusers' SD pipelines feed a student
    with ``time_cond_proj_dim`` (Luo et al. 2023, LCM; their w is the guidance scale minus one)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (scale.float() - 1)[:, None] * 1000 * frequencies[None]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width - 2 * half))


class _Enough(Exception):
    """Raised by a hook once every wanted feature is there."""


@contextmanager
def _catching(backbone: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named modules during a forward (the first tensor, where a module returns several).

    Args:
        stop: end the forward as soon as all of them are there: the rest of the network is not computed.
    """
    caught: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            while isinstance(output, (tuple, list)):
                output = output[0]
            caught[name] = output
            if stop and len(caught) == len(set(names)):
                raise _Enough

        return hook

    handles = [backbone.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield caught
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
