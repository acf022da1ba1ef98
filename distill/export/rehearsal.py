"""What a sampler tells the backbone, without running the backbone: the pipeline's loop and ours, side by side.

The backbone is replaced by one that gives the k-th of a list of fixed answers at its k-th call. As long as two samplers
agree they get the same answers and so stay comparable; the first call at which they do not is named.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Call, Condition, flatten
from distill.export.calls import Plain, call_arguments, call_guidance
from distill.student import Student

#: Largest difference of two states or times that count as equal, relative to the largest value (and to 1): float32
#: arithmetic in another order.
TOLERANCE = 1e-4
SEED = 0


class _Stop(Exception):
    """The scheduler has made its last step: what comes after (decoding) is not rehearsed."""


class _Answer(tuple[Tensor, ...]):
    """What a backbone returns, however it was asked: a tuple, or an object with ``sample``."""

    @property
    def sample(self) -> Tensor:
        return self[0]


@dataclass
class Trace:
    """What happened: the backbone's flattened arguments at each call, and the state after the last step."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    final: Tensor | None = None
    generator_used: bool = False  #: whether the pipeline hands its generator to the scheduler's steps
    error: str | None = None


@contextmanager
def _answering(backbone: nn.Module, answers: Sequence[Tensor], trace: Trace) -> Iterator[None]:
    signature = inspect.signature(backbone.forward)
    hidden, real = backbone.__dict__.get("forward"), backbone.forward

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> _Answer:
        bound = flatten(signature.bind(*args, **kwargs).arguments)
        trace.calls.append({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in bound.items()})
        if len(trace.calls) > len(answers):
            raise ValueError(f"it called the backbone more than {len(answers)} times")
        batch = max((len(v) for v in bound.values() if isinstance(v, Tensor) and v.dim() > 1), default=1)
        answer = answers[len(trace.calls) - 1]
        return _Answer((answer.expand(batch, *answer.shape[1:]).clone(),))

    backbone.forward = forward
    try:
        yield
    finally:
        if hidden is None:
            del backbone.forward
        else:
            backbone.forward = hidden


class Rehearsal:
    """Rehearsals of one student: its own sampler once per number of steps, pipelines as often as wanted."""

    @torch.no_grad()
    def __init__(self, student: Student) -> None:
        self.student = student
        self.inputs = [student.teacher.placeholder()] * 2
        self.condition = student.teacher.condition(self.inputs)
        shape: list[tuple[int, ...]] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output.sample
            shape.append(tuple(value.shape[1:]))

        handle = student.denoiser.backbone.register_forward_hook(see)
        try:
            our_sample(student, self.condition, 1, torch.Generator().manual_seed(SEED), True)
        finally:
            handle.remove()
        draw = torch.Generator().manual_seed(SEED)
        device, dtype = student.teacher.device, student.denoiser.dtype
        self.answers = [torch.randn((1, *shape[0]), generator=draw).to(device, dtype) for _ in student.sampler.times]
        self._ours: dict[tuple[int, bool], Trace] = {}

    def ours(self, steps: int, generator_used: bool) -> Trace:
        """Our own sampler's trace; the fresh noise from the generator, or from PyTorch's global one."""
        if (steps, generator_used) not in self._ours:
            student, trace = self.student, Trace()
            with seeded() as generator, _answering(student.denoiser.backbone, self.answers[:steps], trace):
                trace.final = our_sample(student, self.condition, steps, generator, generator_used)
            self._ours[steps, generator_used] = trace
        return self._ours[steps, generator_used]

    def theirs(self, pipeline: Any, plain: Plain, steps: int, extra: dict[str, Any]) -> Trace:
        """A pipeline's trace, called with so many steps and the extra arguments."""
        trace, backbone = Trace(), getattr(pipeline, self.student.teacher.backbone_name)
        arguments = call_arguments(self.student, pipeline, self.inputs, steps, plain) | extra
        with seeded() as generator, _answering(backbone, self.answers[:steps], trace), _watching(pipeline.scheduler, steps, trace):
            try:
                pipeline(**arguments, generator=generator)
            except _Stop:
                pass
            except Exception as error:  # a scheduler that does not fit the pipeline may fail in any way
                trace.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return trace

    def disagreement(self, pipeline: Any, plain: Plain, steps: int, extra: dict[str, Any]) -> str | None:
        """In words, where the pipeline departs from the student's sampler; None if it does not."""
        theirs = self.theirs(pipeline, plain, steps, extra)
        return compare(self.ours(steps, theirs.generator_used), theirs, self.student.denoiser.call)


def our_sample(student: Student, condition: Condition, steps: int, generator: torch.Generator, generator_used: bool) -> Tensor:
    """The student's x0 for two samples, the first noise from the generator and the fresh noise from it too, or from the
    global one."""
    noise = student.teacher.noise(2, generator)
    return student.sample_from(condition, noise, steps, generator if generator_used else None, call_guidance(student.sampler))


@contextmanager
def seeded(seed: int = SEED) -> Iterator[torch.Generator]:
    """A fresh generator, and PyTorch's global one set as well (and set back afterwards)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@contextmanager
def _watching(scheduler: Any, steps: int, trace: Trace) -> Iterator[None]:
    """Note the state after the last of so many scheduler steps, and stop the pipeline there."""
    original, count = scheduler.step, 0

    @functools.wraps(original)  # pipelines read its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        result = original(*args, **kwargs)
        count += 1
        trace.generator_used |= kwargs.get("generator") is not None
        if count == steps:
            trace.final = (result[0] if isinstance(result, tuple) else result.prev_sample).clone()
            raise _Stop
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def watch_generator(pipeline: Any) -> Callable[[], bool]:
    """A function that says, after the pipeline ran, whether it handed its generator to the scheduler's steps."""
    original, seen = pipeline.scheduler.step, []

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("generator") is not None)
        return original(*args, **kwargs)

    pipeline.scheduler.step = step

    def answer() -> bool:
        del pipeline.scheduler.step
        return any(seen)

    return answer


def compare(ours: Trace, theirs: Trace, call: Call) -> str | None:
    """In words, the first difference of two traces; None if there is none."""
    for k, (a, b) in enumerate(zip(ours.calls, theirs.calls, strict=False), start=1):
        if b[call.state].shape != a[call.state].shape:
            return f"call {k} of the backbone has a batch of shape {tuple(b[call.state].shape)}, not {tuple(a[call.state].shape)}"
        time_a, time_b = (float(torch.as_tensor(x[call.time]).reshape(-1)[0]) for x in (a, b))
        if abs(time_a - time_b) > 1e-5 * max(1.0, abs(time_a)):
            return f"call {k} of the backbone is at {time_b:g}, not {time_a:g}"
        if not _close(a[call.state], b[call.state]):
            return f"the state at call {k} of the backbone differs by {_distance(a[call.state], b[call.state]):.1e}"
    if theirs.error is not None:
        return theirs.error
    if len(ours.calls) != len(theirs.calls):
        return f"it calls the backbone {len(theirs.calls)} times, not {len(ours.calls)}"
    if ours.final is None or theirs.final is None or theirs.final.shape != ours.final.shape:
        return "it ends otherwise"
    if not _close(ours.final, theirs.final):
        return f"its last step differs by {_distance(ours.final, theirs.final):.1e}"
    return None


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) / max(1.0, float(a.double().abs().max()))


def _close(a: Tensor, b: Tensor) -> bool:
    half = torch.float32 not in (a.dtype, b.dtype)
    return _distance(a, b) <= (5e-2 if half else TOLERANCE)
