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

from distill.schedule import Kind, NoiseSchedule


@dataclass(frozen=True)
class Condition:
    """What a backbone is told beside (x_t, t): keyword arguments, batch first, and the same for "nothing told".

    ``values`` may be empty (an unconditional teacher); ``null`` is None where the teacher has no null condition.
    ``guidance`` is a guidance scale per sample, (batch,): a guided teacher uses it in place of its own fixed scale, and
    a backbone with a guidance embedding is told it.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] | None = None
    guidance: Tensor | None = None

    def _map(self, f: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(
            {k: f(v) for k, v in self.values.items()},
            None if self.null is None else {k: f(v) for k, v in self.null.items()},
            None if self.guidance is None else f(self.guidance),
        )

    def __getitem__(self, index: Any) -> Condition:
        return self._map(lambda v: v[index])

    def to(self, device: torch.device | str) -> Condition:
        return self._map(lambda v: v.to(device))

    def with_guidance(self, guidance: Tensor) -> Condition:
        return replace(self, guidance=guidance)

    def without_guidance(self) -> Condition:
        return replace(self, guidance=None)

    def unconditional(self) -> Condition:
        """The null condition for every sample."""
        if self.null is None:
            raise ValueError("this teacher has no null condition")
        return Condition(self.null, self.null, self.guidance)

    def dropped(self, mask: Tensor) -> Condition:
        """The null condition where the (batch,) mask is true."""
        null = self.null
        if null is None:
            raise ValueError("this teacher has no null condition")
        values = {
            k: torch.where(mask.to(v.device).reshape((-1,) + (1,) * (v.dim() - 1)), null[k], v)
            for k, v in self.values.items()
        }
        return Condition(values, null, self.guidance)


def cat(conditions: Sequence[Condition]) -> Condition:
    """Concatenate along the batch."""
    first = conditions[0]

    def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    nulls = [c.null for c in conditions if c.null is not None]
    guidances = [c.guidance for c in conditions if c.guidance is not None]
    return Condition(
        join([c.values for c in conditions]),
        None if first.null is None else join(nulls),
        None if first.guidance is None else torch.cat(guidances),
    )


class Prediction:
    """What a network said at (x_t, t), readable as any kind; each reading converts once, in float64, from the original."""

    def __init__(
        self, value: Tensor, kind: Kind, x_t: Tensor, t: Tensor, schedule: NoiseSchedule,
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.value, self.kind, self.x_t, self.t, self.schedule = value, kind, x_t, t, schedule
        self.features: Mapping[str, Tensor] = features or {}

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
    def velocity(self) -> Tensor:
        return self.as_kind("velocity")

    @property
    def score(self) -> Tensor:
        return self.as_kind("score")


class Denoiser(ABC):
    """``D(x_t, t, condition) -> x0``; ``predict`` for the other kinds and for hidden features."""

    schedule: NoiseSchedule
    kind: Kind  #: the native parameterisation, in which losses on a critic are taken

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
class Call:
    """How a backbone is called, as recorded from its pipeline (see ``teacher.py``)."""

    state: str  #: name of the argument that takes x_t
    time: str  #: name of the argument that takes the time
    time_scale: float = 1.0  #: recorded time / the scheduler's timestep (1 or 1/1000 in practice)
    constants: Mapping[str, Any] = field(default_factory=dict)  #: arguments that are the same at every call
    guidance: str | None = None  #: name of the argument that takes a guidance embedding


class BackboneDenoiser(Denoiser):
    """A diffusers backbone with its schedule and calling convention.

    Args:
        use: entered around each forward; selects the adapter of this role on a shared backbone.
        trained: name → parameter of what training changes; all of the backbone's where None.
    """

    def __init__(
        self, backbone: nn.Module, schedule: NoiseSchedule, kind: Kind, call: Call,
        use: Callable[[], AbstractContextManager[None]] = nullcontext,
        trained: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.backbone, self.schedule, self.kind, self.call, self.use = backbone, schedule, kind, call, use
        self._trained = trained
        # Quantised weights are integers: the dtype is that of the others.
        self.dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by the names that the weights have on disk."""
        return dict(self.backbone.named_parameters() if self._trained is None else self._trained)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t = t.to(x_t.device).expand(len(x_t))
        with _catching(self.backbone, features) as caught, self.use():
            out = self.backbone(**self._arguments(x_t, t, condition))
        value = out[0] if isinstance(out, tuple) else out.sample
        return Prediction(value[:, : x_t.shape[1]], self.kind, x_t, t, self.schedule, caught)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition | None, names: Sequence[str]) -> Mapping[str, Tensor]:
        t = t.to(x_t.device).expand(len(x_t))
        with _catching(self.backbone, names, stop=True) as caught, self.use():
            self.backbone(**self._arguments(x_t, t, condition))
        return caught

    def _arguments(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(self.call.constants)
        if condition is not None:
            arguments |= {k: self._cast(v) for k, v in condition.values.items()}
            if condition.guidance is not None and self.call.guidance is not None:
                config: Any = self.backbone.config
                width = int(config.time_cond_proj_dim)
                arguments[self.call.guidance] = self._cast(guidance_embedding(condition.guidance, width))
        arguments[self.call.state] = x_t.to(self.dtype)
        arguments[self.call.time] = (self.schedule.model_time(t) * self.call.time_scale).float()
        return unflatten(arguments)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


class Guided(Denoiser):
    """Classifier-free guidance D_u + w (D_c − D_u), w = 1 off, in one batched call of the network.

    A condition with a ``guidance`` of its own overrides the fixed scale, sample by sample.
    """

    def __init__(self, denoiser: Denoiser, scale: float) -> None:
        self.denoiser, self.scale, self.schedule, self.kind = denoiser, scale, denoiser.schedule, denoiser.kind

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        if condition is None or (condition.guidance is None and self.scale == 1):
            return self.denoiser.predict(x_t, t, condition, features)
        told = condition.without_guidance()
        t = t.to(x_t.device).expand(len(x_t))
        both = self.denoiser.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), cat([told.unconditional(), told]), features)
        null, cond = both.value.chunk(2)
        w: Tensor | float = self.scale
        if condition.guidance is not None:
            w = condition.guidance.to(null).reshape((-1,) + (1,) * (null.dim() - 1))
        # Guidance is affine with weights that sum to one, so it may be taken in the native parameterisation.
        kept = {name: value.chunk(2)[1] for name, value in both.features.items()}
        return Prediction(null + w * (cond - null), both.kind, x_t, t, self.schedule, kept)


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


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keyword arguments with their paths joined by dots: ``added_cond_kwargs.time_ids``."""
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        here = nested
        for parent in parents:
            here = here.setdefault(parent, {})
        here[leaf] = value
    return nested
