"""A pipeline's sampling loop and ours, side by side, without computing the backbone.

The scheduler of the pipeline is given made-up model outputs, the same at each step for both. As long as two samplers agree
they stay comparable; the first step at which they do not is named. Our sampler starts from the noise that the pipeline
drew, and draws its fresh noise from where the pipeline drew its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distill.denoiser import Condition, Denoiser, Prediction
from distill.export.calls import Plain, call_arguments, probe_inputs
from distill.loading import quiet
from distill.sampling import renoise_sample
from distill.student import Student
from distill.walk import Walk

#: Largest difference of two states that count as equal, relative to the largest value (and to 1): float32 arithmetic in
#: another order.
TOLERANCE = 1e-4
SEED = 0


class Stop(Exception):
    """The scheduler has made its last step: what comes after (decoding) is not rehearsed."""


@dataclass
class Trace:
    """What a pipeline's scheduler did, and the random numbers that it started from."""

    timesteps: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  #: as the backbone gets them: after ``scale_model_input``
    answers: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None
    noise: Tensor | None = None  #: the first sample, of unit variance
    generator_used: bool = False  #: whether fresh noise comes from the call's generator
    randomness: tuple[Tensor, ...] = ()  #: states of the generators at the first step
    error: str | None = None


class MadeUp(Denoiser):
    """A denoiser that says what the scheduler was given, and notes where it was asked; in the scheduler's space."""

    def __init__(self, walk: Walk, answers: list[Tensor]) -> None:
        self.walk, self.schedule, self.kind, self.answers = walk, walk.schedule, walk.kind, answers
        self.states: list[Tensor] = []
        self.timesteps: list[float] = []

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Any = ()) -> Prediction:
        answer = self.answers[len(self.states)] * (self.walk.sign / self.walk.unit)
        self.states.append(x_t * self.walk.unit)
        self.timesteps.append(float(self.schedule.model_time(t).reshape(-1)[0]))
        return Prediction(answer[:, : x_t.shape[1]], self.kind, x_t, t, self.schedule)


class Rehearsal:
    """Rehearsals of one student's sampler on pipelines with one scheduler or another."""

    def __init__(self, student: Student) -> None:
        self.student, self._known = student, {}  # type: ignore[var-annotated]

    @torch.no_grad()
    def disagreement(self, pipeline: Any, plain: Plain, steps: int, extra: dict[str, Any]) -> tuple[str | None, Trace]:
        """In words, where the pipeline departs from the student's sampler (None if it does not); and what it did."""
        trace, student = Trace(), self.student
        backbone = getattr(pipeline, student.teacher.backbone_name)
        arguments = call_arguments(student, pipeline, probe_inputs(student), steps, plain) | extra
        remembering = nullcontext() if student.teacher.looks_inside else self._remembering(backbone)
        scheduler = getattr(pipeline, student.teacher.scheduler_name)
        with seeded() as generator, remembering, watching(scheduler, steps, trace, made_up=True):
            try:
                with quiet():  # schedulers warn of timesteps that they did not choose themselves
                    pipeline(**arguments, generator=generator)
            except Stop:
                pass
            except Exception as error:  # a scheduler that does not fit the pipeline may fail in any way
                trace.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if len(trace.answers) != steps or trace.noise is None:
            return trace.error or f"the scheduler makes {len(trace.answers)} steps, not {steps}", trace
        ours = MadeUp(student.teacher.walk, trace.answers)
        with resumed(trace) as fresh:
            noise = unit_noise(ours.walk, getattr(pipeline, student.teacher.scheduler_name), trace.noise)
            final = renoise_sample(ours, student.sampler.ladder(steps), noise, None, fresh, student.sampler.gamma) * ours.schedule.data_scale
        return compare(ours, final, trace), trace

    @contextmanager
    def _remembering(self, backbone: nn.Module) -> Iterator[None]:
        """The backbone computes only its first call of each form; after that it repeats itself. What it says is not used."""
        hidden, real = backbone.__dict__.get("forward"), backbone.forward

        @functools.wraps(real)
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            form = str(([tuple(v.shape) if isinstance(v, Tensor) else type(v) for v in leaves], spec))
            if form not in self._known:
                self._known[form] = real(*args, **kwargs)
            return pytree.tree_map_only(Tensor, torch.clone, self._known[form])

        backbone.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            if hidden is None:
                del backbone.forward
            else:
                backbone.forward = hidden  # type: ignore[method-assign]


def unit_noise(walk: Walk, scheduler: Any, noise: Tensor) -> Tensor:
    """A trace's noise with unit variance also where the pipeline, not its scheduler, scales the first sample."""
    return noise if walk.trivial else noise * (getattr(scheduler, "init_noise_sigma", 1.0) / walk.noise_scale)


def compare(ours: MadeUp, final: Tensor, theirs: Trace) -> str | None:
    """In words, the first difference of two samplers; None if there is none."""
    for k, (a, b) in enumerate(zip(ours.states, theirs.states, strict=True)):
        if a.shape != b.shape:
            return f"step {k + 1} has a state of shape {tuple(b.shape)}, not {tuple(a.shape)}"
        time_a, time_b = ours.timesteps[k], theirs.timesteps[k]
        if abs(time_a - time_b) > 1e-5 * max(1.0, abs(time_a)):
            return f"step {k + 1} is at timestep {time_b:g}, not {time_a:g}"
        if not _close(a, b):
            return f"the state at step {k + 1} differs by {distance(a, b):.1e}"
    if theirs.final is None or theirs.final.shape != final.shape:
        return "it ends otherwise"
    return None if _close(final, theirs.final) else f"the last step differs by {distance(final, theirs.final):.1e}"


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value (but at least 1)."""
    return float((a.double() - b.double()).abs().max()) / max(1.0, float(a.double().abs().max()))


def _close(a: Tensor, b: Tensor) -> bool:
    return distance(a, b) <= (TOLERANCE if b.dtype == torch.float32 else 5e-2)


# -- watching -----------------------------------------------------------------------------------------------------------


@contextmanager
def watching(scheduler: Any, steps: int, trace: Trace, made_up: bool) -> Iterator[None]:
    """Note what a pipeline's scheduler does.

    Args:
        made_up: replace the model outputs by made-up ones, and stop the pipeline after so many steps.
    """
    original = scheduler.step
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)  # pipelines read its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        sample: Tensor = given["sample"]
        if not trace.answers:
            trace.noise = sample / getattr(scheduler, "init_noise_sigma", 1.0)
            generator = given.get("generator")
            generator = getattr(scheduler, "generator", None) if generator is None else generator
            trace.generator_used = generator is not None
            trace.randomness = _states(generator)
        trace.timesteps.append(float(torch.as_tensor(given["timestep"]).reshape(-1)[0]))
        scale = getattr(scheduler, "scale_model_input", None)
        trace.states.append((sample if scale is None else scale(sample, given["timestep"])).clone())
        if made_up:
            output = given["model_output"]
            draw = torch.Generator().manual_seed(1000 + len(trace.answers))
            given["model_output"] = torch.randn(output.shape, generator=draw).to(output)
        trace.answers.append(given["model_output"].clone())
        result = original(**given)
        trace.final = (result[0] if isinstance(result, tuple) else result.prev_sample).clone()
        if made_up and len(trace.answers) == steps:
            raise Stop
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def seeded() -> Iterator[torch.Generator]:
    """A fresh generator, and PyTorch's global one set as well (and set back afterwards). Their seeds differ: with equal ones
    the first fresh noise would repeat the initial noise, and re-noising would look like a step of the ODE."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED + 1)
        yield torch.Generator().manual_seed(SEED)


@contextmanager
def resumed(trace: Trace) -> Iterator[torch.Generator | None]:
    """The generator for fresh noise as the pipeline had it at its first step; None for PyTorch's global one, set back to then."""
    with torch.random.fork_rng():
        if trace.generator_used:
            generator = torch.Generator()
            generator.set_state(trace.randomness[0])
            yield generator
        else:
            torch.set_rng_state(trace.randomness[0])
            if len(trace.randomness) > 1:
                torch.cuda.set_rng_state_all(list(trace.randomness[1:]))
            yield None


def _states(generator: Any) -> tuple[Tensor, ...]:
    if isinstance(generator, torch.Generator):
        return (generator.get_state(),)
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ()))


