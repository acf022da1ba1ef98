"""The stock scheduler that samples exactly as a student does.

Candidates are tried in order, each on the real pipeline with made-up model outputs (``rehearsal.py``): the first that asks
at the same times from the same states, for every number of steps, is taken. Preferred is one
that needs nothing but ``num_inference_steps`` at the default number of steps; failing that, one whose timesteps or sigmas
have to be given. The traps that make a plausible configuration wrong, and how each is met:

* ``FlowMatchEulerDiscreteScheduler`` shifts the sigmas that are passed to it again: they are passed unshifted;
* ``LCMScheduler`` takes its timesteps from a grid of ``original_inference_steps``, 50 by default: here the ladder's length;
* ``TCDScheduler`` ends at the noise level of timestep 0, not at clean data: its table starts with clean data here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.export import assembly
from distill.export.calls import Plain, plain_call, takes
from distill.export.rehearsal import Rehearsal
from distill.schedule import Flow, NoiseSchedule, TabulatedVP
from distill.student import Student

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
#: Schedulers of teachers that are themselves few-step samplers: the student's may be the same one.
FEW_STEP = ("LCMScheduler", "TCDScheduler", "SCMScheduler", "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler")
Options = Sequence[dict[str, Any]]


class NoStockScheduler(UserError):
    """No stock scheduler reproduces the student's sampler; the few-step pipeline file does."""


@dataclass(frozen=True)
class Stock:
    """A stock scheduler that was found to sample as the student does.

    Args:
        calls: by number of steps, the arguments that the call needs beside it (none, in the best case).
        plain: the arguments of every call.
        generator_used: False where the pipeline does not hand its generator to the scheduler: the fresh noise then
            comes from PyTorch's global generator.
    """

    scheduler: Any
    calls: dict[int, dict[str, Any]]
    plain: Plain
    generator_used: bool


@dataclass(frozen=True)
class Candidate:
    """A stock scheduler and, for given times, the further arguments of the call to try, the shortest first."""

    scheduler: Any
    options: Callable[[Sequence[float]], Options]


def choose(student: Student, assemble: Callable[[Any], Any]) -> Stock:
    """The first candidate that samples as the student does.

    Args:
        assemble: the student's pipeline around a given scheduler.

    Raises:
        NoStockScheduler: if there is none.
    """
    rehearsal, found, reasons = Rehearsal(student), [], []
    steps = student.sampler.steps
    for candidate in candidates(student):
        fitting = _fit(student, rehearsal, candidate, assemble)
        if isinstance(fitting, str):
            reasons.append(f"{type(candidate.scheduler).__name__}: {fitting}")
            continue
        if not fitting.calls[steps]:
            return fitting
        found.append(fitting)
    if found:
        return found[0]
    times = ", ".join(f"{t:g}" for t in student.sampler.times)
    why = f" ({reasons[0]})" if reasons else ""
    raise NoStockScheduler(f"no stock scheduler samples this student at its times {times}{why}: use --to few-step, which writes a pipeline file that does")


def _fit(student: Student, rehearsal: Rehearsal, candidate: Candidate, assemble: Callable[[Any], Any]) -> Stock | str:
    """The candidate with what its calls need, or why it does not do."""
    try:
        pipeline = assemble(candidate.scheduler)
    except (ValueError, TypeError, AttributeError) as error:
        return str(error)
    plain, calls, sampler, generator_used = plain_call(student, pipeline), {}, student.sampler, True
    for steps in sorted(range(1, len(sampler.times) + 1), key=lambda n: n != sampler.steps):  # the default number first
        times = sampler.ladder(steps)
        reason: str | None = None
        for option in candidate.options(times):
            if not takes(pipeline, *option):
                continue
            wrong, trace = rehearsal.disagreement(pipeline, plain, steps, option)
            if wrong is None:
                calls[steps] = option
                generator_used &= trace.generator_used
                break
            reason = reason or f"in {steps} steps, {wrong}"
        if steps not in calls:
            return reason or f"{type(pipeline).__name__} takes no timesteps"
    return Stock(type(candidate.scheduler).from_config(candidate.scheduler.config), dict(sorted(calls.items())), plain, generator_used)


# -- candidates ---------------------------------------------------------------------------------------------------------


def candidates(student: Student) -> Iterator[Candidate]:
    """Stock schedulers on the teacher's schedule, for the student's kind of prediction and its share of fresh noise."""
    schedule, gamma = student.teacher.walk.schedule, student.sampler.gamma
    own = assembly.own_scheduler(student)
    if type(own).__name__ in FEW_STEP:
        unclipped = {"clip_denoised": False} if "clip_denoised" in own.config else {}
        yield Candidate(type(own).from_config(own.config, **unclipped), lambda times: [{}, *_own_options(schedule, times)])
    if isinstance(schedule, TabulatedVP) and student.teacher.scheduler_kind in PREDICTION_TYPES:
        yield from _variance_preserving(student, schedule, gamma)
    if isinstance(schedule, Flow) and student.teacher.scheduler_kind == "velocity" and gamma in (0.0, 1.0):
        yield from _flow(student, schedule, gamma)


def _own_options(schedule: NoiseSchedule, times: Sequence[float]) -> Options:
    steps = [float(t) for t in _model_times(schedule, times)]
    off = {"intermediate_timesteps": None}  # SCM has a second timestep of its own in two steps
    return [{"max_timesteps": steps[0]} | off, {"timesteps": [*steps, 0.0], "max_timesteps": None} | off, {"timesteps": steps}]


def _variance_preserving(student: Student, schedule: TabulatedVP, gamma: float) -> Iterator[Candidate]:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler

    own, length = assembly.own_scheduler(student), len(student.sampler.times)
    prediction_type = PREDICTION_TYPES[student.teacher.scheduler_kind]
    alphas_cumprod = schedule.angles[1:].cos().cpu() ** 2

    def timesteps(times: Sequence[float]) -> Options:
        """The ladder itself, where it lies on whole timesteps."""
        exact = _model_times(schedule, times)
        whole = exact.round()
        return [{"timesteps": [int(t) for t in whole]}] if torch.allclose(exact, whole, atol=1e-6) else []

    if gamma == 1:
        lcm = _on_table(LCMScheduler, own, alphas_cumprod, prediction_type, original_inference_steps=length, clip_sample=False, set_alpha_to_one=True)
        yield Candidate(lcm, lambda times: [{}, *timesteps(times)])
    if gamma == 0:
        trailing = {"timestep_spacing": "trailing", "steps_offset": 0}
        ddim = _on_table(DDIMScheduler, own, alphas_cumprod, prediction_type, clip_sample=False, set_alpha_to_one=True, **trailing)
        yield Candidate(ddim, lambda times: [{}])
        yield Candidate(_on_table(EulerDiscreteScheduler, own, alphas_cumprod, prediction_type, **trailing), lambda times: [{}, *timesteps(times)])
    clean = alphas_cumprod.clone()
    clean[0] = 1.0
    tcd = TCDScheduler(
        num_train_timesteps=len(clean), trained_betas=betas_of(clean), prediction_type=prediction_type, original_inference_steps=length, clip_sample=False,
    )
    eta = {"eta": float(gamma)}
    plainest = [{}, eta] if gamma == 0 else [eta]  # most pipelines pass eta = 0 if nothing is said
    yield Candidate(tcd, lambda times: [*plainest, *({**eta, **o} for o in timesteps(times))])


def _on_table(cls: type[Any], own: Any, alphas_cumprod: Tensor, prediction_type: str, **settings: Any) -> Any:
    """A scheduler on the teacher's noise levels: by the teacher's own configuration where that gives them, else by a table."""
    import inspect

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    config = {k: own.config[k] for k in keys if own.config.get(k) is not None and k in inspect.signature(cls.__init__).parameters}
    try:
        made = cls(**config, prediction_type=prediction_type, **settings)
    except NotImplementedError:  # a beta schedule that this class does not know
        made = None
    if made is None or len(made.alphas_cumprod) != len(alphas_cumprod) or not torch.allclose(made.alphas_cumprod.double(), alphas_cumprod, atol=1e-6):
        betas = betas_of(alphas_cumprod)
        made = cls(num_train_timesteps=len(alphas_cumprod), trained_betas=betas, prediction_type=prediction_type, **settings)
    return made


def betas_of(alphas_cumprod: Tensor) -> list[float]:
    """The betas whose products 1 − beta are the given table: beta_k = 1 − abar_k / abar_(k−1)."""
    table = alphas_cumprod.double()
    before = torch.cat([table.new_ones(1), table[:-1]])
    return [float(b) for b in 1 - table / before]


def _flow(student: Student, schedule: Flow, gamma: float) -> Iterator[Candidate]:
    import diffusers

    own = assembly.own_scheduler(student).config.get("shift")
    shifts = dict.fromkeys([shift_of(student.sampler.times), 1.0, float(own) if isinstance(own, (int, float)) else 1.0])
    train = int(schedule.scale)
    inverted = {"invert_sigmas": True} if schedule.inverted else {}
    for shift in shifts:
        def sigmas(times: Sequence[float], shift: float = shift) -> Options:
            return [{}, {"sigmas": [unshift(t, shift) for t in times]}]

        stochastic = {"stochastic_sampling": True} if gamma == 1 else {}
        yield Candidate(diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=train, shift=shift, **stochastic, **inverted), sigmas)
        flow_map = getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)  # not in older releases
        if gamma == 0 and flow_map is not None:
            yield Candidate(flow_map(num_train_timesteps=train, shift=shift), sigmas)


def shift_of(times: Sequence[float]) -> float:
    """The shift s that takes the even ladder 1 − i/n to these times, by the second of them: t = s u / (1 + (s − 1) u)."""
    if len(times) < 2 or not 0 < times[1] < 1:
        return 1.0
    u = 1 - 1 / len(times)
    return round(times[1] * (1 - u) / (u * (1 - times[1])), 6)


def unshift(time: float, shift: float) -> float:
    """The u whose shifted value is the time."""
    return time / (shift - (shift - 1) * time)


def _model_times(schedule: NoiseSchedule, times: Sequence[float]) -> Tensor:
    return schedule.model_time(torch.tensor(times, dtype=torch.float64))
