"""What a pipeline does while it runs: every call of its networks and every step of its scheduler, in order.

Nothing of the pipeline is replaced but, for the time of a recording, ``forward`` of its networks (to note arguments, or to
answer without computing) and the stepping methods, ``scale_model_input`` and ``set_timesteps`` of its schedulers' classes:
pipelines copy their schedulers, and look at the signatures of those functions, which therefore stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distill.errors import UserError


class Stop(Exception):
    """Raised inside a pipeline that has shown enough."""


@dataclass
class NetworkCall:
    """One call of one network: its arguments by name, and what it returned (None where it was not computed)."""

    network: str
    arguments: dict[str, Any]
    output: Any = None


def calls_of(calls: Sequence[NetworkCall], network: str) -> list[NetworkCall]:
    """One network's calls among those of all."""
    return [c for c in calls if c.network == network]


@dataclass
class Step:
    """One step of the scheduler, and the network calls since the last one."""

    calls: list[NetworkCall]
    timestep: Tensor
    sample: Tensor
    scaled: Tensor  #: the sample as ``scale_model_input`` left it, if the pipeline asked for that
    model_output: Tensor
    result: Tensor
    settings: dict[str, Any] = field(default_factory=dict)  #: further arguments
    sigma: float | None = None  #: the scheduler's own noise level there, where it has a table of them
    scheduler: Any = None  #: that made it
    method: str = "step"  #: of the scheduler

    def joined(self, other: Step) -> Step:
        """This step and that of a second state at the same time (sound beside pictures) as one of both, laid end to end: (1, all of their elements)."""
        names = ("sample", "scaled", "model_output", "result")
        both: dict[str, Any] = {name: torch.cat([getattr(self, name).flatten(1), getattr(other, name).flatten(1)], 1) for name in names}
        return replace(self, **both)

    def calls_of(self, network: str) -> list[NetworkCall]:
        """That network's calls for it."""
        return calls_of(self.calls, network)


@dataclass
class Recording:
    """A pipeline's run."""

    steps: list[Step] = field(default_factory=list)
    calls: list[NetworkCall] = field(default_factory=list)  #: since the last step
    scaled: Tensor | None = None
    scheduler: Any = None  #: whose ``set_timesteps`` came last: the one that samples
    result: Any = None  #: what the pipeline returned

    def first_calls(self, network: str) -> list[NetworkCall]:
        """A network's calls in the first step that it has a part in, finished or not."""
        return next((mine for calls in [*(s.calls for s in self.steps), self.calls] if (mine := calls_of(calls, network))), [])

    def steps_of(self, network: str | None) -> list[Step]:
        """The steps that a network has a part in; all for None."""
        return [s for s in self.steps if network is None or s.calls_of(network)]


@contextmanager
def record(
    pipeline: Any, *, compute: int | None = None, answers: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None,
    stop: Callable[[Recording], bool] | None = None, override: Callable[[Step], Tensor | None] | None = None,
) -> Iterator[Recording]:
    """Record what the pipeline does inside the block. ``Stop`` is raised inside it when ``stop`` says so.

    Args:
        compute: after so many scheduler steps the networks repeat their last answer instead of computing.
        answers: network name → what it returns for its arguments, instead of computing.
        stop: asked before each network call (which is noted, and not computed if it stops) and after each step, when the next
            one begins: two schedulers may have stepped.
        override: the sample that a scheduler step shall result in, whatever the scheduler says; None: as it says.
    """
    recording = Recording()
    last: dict[str, Any] = {}
    inside: list[str] = []  # the stepping methods that run: some call each other
    scale_original = {c: c.scale_model_input for c in schedulers(pipeline) if hasattr(c, "scale_model_input")}

    def forward_of(name: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if stop is not None and not recording.calls and recording.steps and stop(recording):
                raise Stop
            call = NetworkCall(name, _copy(_bound(signature, args, kwargs)))
            recording.calls.append(call)
            if stop is not None and stop(recording):
                raise Stop
            if answers is not None and name in answers:
                call.output = answers[name](call.arguments)
                return call.output
            if compute is not None and len(recording.steps) >= compute and name in last:
                return _copy(last[name])
            output = original(*args, **kwargs)
            call.output = last[name] = _copy(output)
            return output

        return forward

    def step_of(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if inside:
                return original(self, *args, **kwargs)
            given = signature.bind(self, *args, **kwargs).arguments
            sample, output = given["sample"].clone(), given["model_output"].clone()
            timestep = given["timestep"] if "timestep" in given else given["timesteps"]
            scaled = sample if recording.scaled is None else recording.scaled
            if scaled.shape[1:] != sample.shape[1:]:  # the pipeline scaled it together with something else
                scaled = scale_original[type(self)](self, sample, timestep)
            known = ("self", "model_output", "timestep", "timesteps", "sample", "return_dict", "generator")
            settings = {k: v for k, v in given.items() if k not in known}
            sigma = sigma_at(self, timestep)
            done = Step(recording.calls, torch.as_tensor(timestep).clone(), sample, scaled, output, sample, settings, sigma, self, method)
            inside.append(method)
            try:
                result = original(self, *args, **kwargs)
            finally:
                inside.pop()
            wanted = override(done) if override is not None else None
            if wanted is not None:
                result = _replaced(result, wanted)
            done.result = _first(result).clone()
            if recording.scheduler is not self and _at_once(recording.steps, done):  # a scheduler for each of two states
                recording.steps[-1] = recording.steps[-1].joined(done)
            else:
                recording.steps.append(done)
                recording.scheduler = self
            recording.calls, recording.scaled = [], None
            return result

        return step

    def scale_of(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            scaled: Tensor = original(self, sample, *args, **kwargs)
            recording.scaled = scaled.clone()
            return scaled

        return scale_model_input

    def set_of(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
            recording.scheduler = self
            return original(self, *args, **kwargs)

        return set_timesteps

    wrappers = {"scale_model_input": scale_of, "set_timesteps": set_of}
    with ExitStack() as stack:
        for name, module in networks(pipeline).items():
            stack.enter_context(_swapped(module, "forward", forward_of(name, module, module.forward)))
            stack.enter_context(_same_processors(module))
        for scheduler in schedulers(pipeline):
            for attribute, wrap in wrappers.items():
                if hasattr(scheduler, attribute):
                    stack.enter_context(_swapped(scheduler, attribute, wrap(getattr(scheduler, attribute))))
            for method in stepping_methods(scheduler):
                stack.enter_context(_swapped(scheduler, method, step_of(method, getattr(scheduler, method))))
        yield recording


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's networks by the names of its components."""
    return {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)}


def find_backbone(pipeline: Any) -> tuple[str, nn.Module]:
    """The network that a pipeline most likely denoises with, before anything has run: the largest one that is no autoencoder
    and no text or image encoder. (What really denoises is found by probing.)

    Raises:
        UserError: if it has none.
    """
    found = {k: v for k, v in networks(pipeline).items() if "encoder" not in k and not (hasattr(v, "encode") and hasattr(v, "decode"))}
    if not found:
        raise UserError(f"{type(pipeline).__name__} has no backbone: it cannot be a teacher")
    return max(found.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def sigma_at(scheduler: Any, timestep: Any) -> float | None:
    """The noise level in a scheduler's table at one of its timesteps, which may be rounded where the level is not."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if not isinstance(sigmas, Tensor) or not isinstance(timesteps, Tensor) or len(sigmas) < len(timesteps):
        return None
    places = (timesteps == torch.as_tensor(timestep).reshape(-1)[0].to(timesteps)).nonzero()
    return float(sigmas[places[0, 0]]) if len(places) else None


def schedulers(pipeline: Any) -> list[type]:
    """The classes of the pipeline's schedulers."""
    return list(dict.fromkeys(type(v) for v in pipeline.components.values() if hasattr(v, "set_timesteps") and stepping_methods(type(v))))


def stepping_methods(scheduler: type) -> list[str]:
    """The methods of a scheduler that take a sample one step on: ``step``, and what some pipelines call in its place
    (``batch_step_no_noise``, ``step_pred``). Each takes a model output, a timestep and a sample."""

    def takes(method: Any) -> bool:
        parameters = set(inspect.signature(method).parameters) if inspect.isfunction(method) else set()
        return {"model_output", "sample"} <= parameters and bool({"timestep", "timesteps"} & parameters)

    return [name for name in dir(scheduler) if "step" in name and not name.startswith("_") and takes(getattr(scheduler, name))]


def _at_once(steps: Sequence[Step], step: Step) -> bool:
    """Whether no network has run since the last step, which was at the same time."""
    return bool(steps) and bool(steps[-1].calls) and not step.calls and torch.equal(steps[-1].timestep, step.timestep)


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; those that land in **kwargs beside the others."""
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in bound:
            bound |= bound.pop(name)
    return dict(bound)


def _copy(value: Any) -> Any:
    """The same with every tensor copied: pipelines reuse buffers."""
    return pytree.tree_map_only(Tensor, lambda v: v.detach().clone(), value)


def take_step(
    method: Callable[..., Any], model_output: Tensor, timestep: Tensor, sample: Tensor, generator: torch.Generator | None, settings: Mapping[str, Any],
) -> Tensor:
    """The sample that a stepping method makes; it gets the generator if it takes one."""
    taken = inspect.signature(method).parameters
    known = {k: v for k, v in {"generator": generator, "return_dict": False}.items() if k in taken}
    return _first(method(model_output, timestep, sample, **known, **settings))


def _first(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result.prev_sample  # type: ignore[no-any-return]


def _replaced(result: Any, sample: Tensor) -> Any:
    def replaced(value: Any) -> Any:  # also the clean samples that some schedulers give beside, and pipelines decode
        return sample if isinstance(value, Tensor) and value.shape == sample.shape else value

    if isinstance(result, Tensor):
        return replaced(result)
    if isinstance(result, tuple):
        return tuple(replaced(v) for v in result)
    return type(result)(**{k: replaced(v) for k, v in result.items()})


@contextmanager
def _same_processors(module: nn.Module) -> Iterator[None]:
    """The attention processors are afterwards as they were: a pipeline that is stopped does not put back those that it replaced."""
    before = dict(getattr(module, "attn_processors", {}))
    try:
        yield
    finally:
        after = getattr(module, "attn_processors", {})
        if any(after.get(name) is not processor for name, processor in before.items()):
            module.set_attn_processor(before)  # type: ignore[operator]


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute set for the time of the block; an inherited one is seen again afterwards."""
    had, old = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, old)
        else:
            delattr(owner, name)
