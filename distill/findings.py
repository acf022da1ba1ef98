"""Everything that there is to know of a pipeline's way of denoising, found by running it (``probe``)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distill.call import Affine, Layout, flatten, same
from distill.denoiser import Companion
from distill.guidance import find_rule
from distill.overrides import Override
from distill.preconditioned import ENOUGH_STEPS, find_floor, find_preconditioned
from distill.probing import NotUnderstood, Understanding, feeding, per_copy_answer, understand, understand_answer
from distill.recording import NetworkCall, Recording, Step, networks
from distill.running import OTHER_GUIDANCE, Runner, after_steps, before_calls, is_cascade, repeated
from distill.schedule import NoiseSchedule, from_scheduler
from distill.walk import Walk

SEEN_STEPS = 3  #: of a recording are computed: two timesteps differ, even where a solver visits one twice
PROBE_GUIDANCE = 3.0
LONGER_PROMPT = "two trees on a small hill"


@dataclass(frozen=True)
class Guidance:
    """How a pipeline arranges classifier-free guidance."""

    argument: str  #: of its call
    off: float
    copies: int  #: in one call of the backbone
    calls: int  #: of the backbone per step
    conditional: int  #: which of the two answers is the conditional one
    rule: str  #: how it combines them (``guidance.RULES``)
    skipped: int = 0  #: calls before these in each step whose answers it does not combine: it looks at attention maps, say


@dataclass(frozen=True)
class Findings:
    """What probing found."""

    network: str  #: the component that denoises
    backbone: nn.Module
    understood: Understanding
    companions: tuple[tuple[Companion, Understanding], ...]
    walk: Walk  #: from the scheduler's samples to the backbone's states and back
    recorded: Recording  #: a few computed steps for one input, as told in the backbone's space (``Walk.translated``)
    template: Any  #: the backbone's answer to one input
    batched: bool  #: whether the pipeline takes several inputs at once
    off: dict[str, float]  #: the arguments of the pipeline's call that switch guidance off
    guidance: Guidance | None = None

    @property
    def answers(self) -> dict[str, Any]:
        """What the backbone answers without computing (``recording.record``)."""
        return {self.network: repeated(self.template, self.understood.whole, self.understood.call.state)}

    @property
    def schedule(self) -> NoiseSchedule:
        """The backbone's."""
        return self.walk.own

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.understood.sample_shape

    def single(self, value: Tensor) -> Tensor:
        """What a scheduler was given or made, for one input, as (1, *sample_shape or more channels)."""
        rows = 1 if len(self.sample_shape) == value.dim() - 1 else self.sample_shape[0]
        return value[:1] if rows == 1 else value[:rows].unsqueeze(0)

    def rows(self, x: Tensor) -> Tensor:
        """A batch (batch, *sample_shape) as the scheduler takes it: video pipelines give it a row per frame."""
        return x if x.dim() == self.recorded.steps_of(self.network)[0].sample.dim() else x.flatten(0, 1)


def probe(runner: Runner, override: Override) -> Findings:
    """Run the pipeline a few times and read off how it denoises.

    Raises:
        NotUnderstood: naming the one thing that could not be inferred.
        ValueError: for a scheduler whose noise schedule is not known, or what the pipeline itself refuses.
    """
    found: Findings | None = None
    problem: Exception | None = None
    for off in runner.offs:
        try:
            candidate = _unguided(runner, override, off)
        except Exception as error:  # the pipeline may refuse the second value
            problem = problem or error
            continue
        found = found or candidate
        if candidate.understood.copies == 1:
            found = candidate
            break
    if found is None:
        assert problem is not None
        raise problem
    return _with_guidance(found, runner)


def _unguided(runner: Runner, override: Override, off: dict[str, float]) -> Findings:
    network, one = _first_run(runner, override, off)
    backbone, steps = networks(runner.pipeline)[network], one.steps_of(network)
    _check_steps(steps)
    others = {c.network for s in one.steps for c in s.calls[-1:]} - {network}
    if len(steps) < 2:
        raise NotUnderstood(f"it denoises with {', '.join(sorted(others | {network}))} in turn" if others else f"it made {len(steps)} steps only", "network")
    template = one.first_calls(network)[-1].output
    settings: dict[str, Any] = {"stop": before_calls(1, network), "answers": {network: repeated(template, (), None)}}
    two = _tolerant(runner, [runner.placeholder] * 2, off, **settings)
    other = runner.run([LONGER_PROMPT], off, **settings) if runner.input_name == "prompt" and isinstance(runner.placeholder, str) else None
    if two is not None and _multiplies(one.first_calls(network)[-1], two.first_calls(network)[-1]):
        two = None
    if other is not None and not any(p.is_meta for p in backbone.parameters()):  # a plan's encoders answer alike
        _check_told(network, one, other)
    try:
        understood, two = _understand(backbone, network, one, two, other, override)
    except NotUnderstood:
        found = find_preconditioned(backbone, network, one, two, other, override)
        if found is None:
            raise
        understood, walk, one = found
        companions = _find_companions(runner.pipeline, understood, network, backbone, one, two, other)
    else:
        companions = _find_companions(runner.pipeline, understood, network, backbone, one, two, other)
        walk = Walk.plain(one.scheduler, *from_scheduler(one.scheduler))
        one = walk.translated(one)
        understood = understand_answer(understood, backbone, network, one, walk.own, walk.kind, override)
        if understood.kind != walk.kind:  # the pipeline converts: the same way everywhere?
            run = runner.run([runner.placeholder], off, steps=ENOUGH_STEPS, compute=1, lenient=True, stop=after_steps(ENOUGH_STEPS, network))
            walk = replace(walk, floor=find_floor(walk, understood, network, run))
    return Findings(network, backbone, understood, companions, walk, one, template, two is not None, off)


def _check_told(network: str, one: Recording, other: Recording) -> None:
    """Whether the network is told of the prompt at all.

    Raises:
        NotUnderstood: if its calls for two prompts are the same: the unconditional one of two networks, for instance.
    """
    calls = [flatten(r.first_calls(network)[-1].arguments) for r in (one, other)]
    if same(*calls):
        raise NotUnderstood(f"the calls of {network} do not depend on the prompt: name the network that is told of it", "network")


def _check_steps(steps: Sequence[Step]) -> None:
    """Whether these are steps of a noisy sample, one at a time.

    Raises:
        ValueError, NotUnderstood: if they are not.
    """
    for step in steps:
        if not step.sample.is_floating_point():
            raise ValueError("its state is a grid of tokens (integers), not a noisy sample; discrete diffusion cannot be a teacher here")
        if len(step.timestep.unique()) > 1:
            told = ", ".join(f"{float(t):g}" for t in step.timestep.unique(sorted=True))
            raise NotUnderstood(f"its scheduler makes several steps at once (timesteps {told}): give its call the argument for one at a time", "call")


def _first_run(runner: Runner, override: Override, off: dict[str, float]) -> tuple[str, Recording]:
    """The component that denoises, and a few computed steps of it. It is the last one that is called before the scheduler's
    first step; in a cascade, which has to run to its end once to show it, before the last one."""
    if override.network is not None and override.network not in networks(runner.pipeline):
        raise NotUnderstood(f"it has no network {override.network!r}", "network")
    cascade = override.network is None and is_cascade(runner.pipeline)
    stop = None if cascade else after_steps(SEEN_STEPS, override.network)
    seen = runner.run([runner.placeholder], off, lenient=cascade, stop=stop)
    if override.network is not None:
        return override.network, seen
    telling = seen.steps[-1 if cascade else 0].calls if seen.steps else []
    if not telling:
        raise NotUnderstood("it never called its scheduler's step after a network", "network")
    network = telling[-1].network
    seen.steps = seen.steps_of(network)[:SEEN_STEPS] if cascade else seen.steps
    return network, seen


def _tolerant(runner: Runner, inputs: Sequence[Any], off: dict[str, float], **settings: Any) -> Recording | None:
    """A recording, or None if the pipeline refuses these inputs."""
    try:
        return runner.run(inputs, off, **settings)
    except Exception:
        return None


def _multiplies(one: NetworkCall, two: NetworkCall) -> bool:
    """Whether some argument for two inputs is four times that for one: such pipelines (Würstchen's) repeat each prompt by the
    number of prompts, and are asked one by one."""
    a, b = flatten(one.arguments), flatten(two.arguments)
    return any(isinstance(v, Tensor) and v.dim() > 1 and isinstance(b.get(k), Tensor) and len(b[k]) == 4 * len(v) for k, v in a.items())


def _understand(
    backbone: nn.Module, network: str, one: Recording, two: Recording | None, other: Recording | None, override: Override,
) -> tuple[Understanding, Recording | None]:
    """The calling convention; and the recording of two inputs, unless the pipeline made one sample of them."""
    problem: NotUnderstood | None = None
    if two is not None:
        try:
            understood = understand(backbone, network, one, two, other, override)
            if _doubles(understood, one.first_calls(network)[-1], two.first_calls(network)[-1]):
                return understood, two
        except NotUnderstood as error:
            problem = error
    try:
        return understand(backbone, network, one, None, other, override), None
    except NotUnderstood as error:
        raise problem or error from None


def _doubles(understood: Understanding, one: NetworkCall, two: NetworkCall) -> bool:
    """Whether two inputs make two samples: some pipelines take a list of prompts for a single long one."""
    a, b = (pytree.tree_leaves(flatten(c.arguments, understood.whole).get(understood.call.state)) for c in (one, two))
    return sum(v.numel() for v in b if isinstance(v, Tensor)) == 2 * sum(v.numel() for v in a if isinstance(v, Tensor))


def _find_companions(
    pipeline: Any, understood: Understanding, network: str, backbone: nn.Module, one: Recording, two: Recording | None, other: Recording | None,
) -> tuple[tuple[Companion, Understanding], ...]:
    """The networks whose answers explain what else changes in the backbone's call from step to step."""
    missing = list(understood.unexplained)
    found: list[tuple[Companion, Understanding]] = []
    calls = one.steps_of(network)[0].calls
    flat = flatten(one.first_calls(network)[-1].arguments, understood.whole)
    for call in calls:
        feeds = feeding(missing, flat, call) if call.network != network and call.output is not None else {}
        if feeds:
            module = networks(pipeline)[call.network]
            its = understand(module, call.network, one, two, other, Override())
            if its.unexplained:
                raise NotUnderstood(f"argument {its.unexplained[0]!r} of {type(module).__name__} changes from step to step", "network")
            found.append((Companion(call.network, module, its.call, feeds), its))
            missing = [m for m in missing if m not in feeds]
    if missing:
        raise NotUnderstood(
            f"argument {missing[0]!r} of {type(backbone).__name__} changes from step to step, and is neither the state, nor a time, "
            "nor another network's answer", "constants",
        )
    return tuple(found)


# -- guidance -----------------------------------------------------------------------------------------------------------


def _with_guidance(found: Findings, runner: Runner) -> Findings:
    """With how guidance is arranged, and the argument that takes the scale itself where the backbone has one. Some pipelines
    are guided only if they are given a negative prompt: then it is the empty one."""
    guidance = None
    empty = [""] if runner.negative is None and "negative_prompt" in runner.parameters else []
    for (name, off), negative in itertools.product(found.off.items(), [runner.negative, *empty]):
        if name in OTHER_GUIDANCE or guidance is not None:
            continue
        run = functools.partial(_tolerant, runner) if empty and negative is None else runner.run
        recording = run([runner.placeholder], found.off | {name: PROBE_GUIDANCE}, stop=after_steps(1, found.network), negative=[negative])
        if recording is None:  # it refuses to be guided without one
            continue
        step = recording.steps_of(found.network)[0]
        everything = step.calls_of(found.network)
        calls, answers = _combined(found, everything)
        guided = _as_backbone_says(found, step)
        if len(answers) == 1:
            found = _with_embedded(found, name, off, calls[0])
        elif len(answers) == 2:
            tolerance = 1e-4 if guided.dtype == torch.float32 else 2e-2
            rule = find_rule(answers, guided, PROBE_GUIDANCE, tolerance, found.sample_shape[0])
            if rule is not None:
                guidance = Guidance(name, off, 2 // len(calls), len(calls), rule[1], rule[0], len(everything) - len(calls))
                runner.negative = negative
                found = _with_call(_with_null_conditions(found, calls), conditional=rule[1] if len(calls) == 1 else 1)
    return replace(found, guidance=guidance)


def _as_backbone_says(found: Findings, step: Step) -> Tensor:
    """What the scheduler was given for one input, as the backbone's kind of prediction."""
    walk, kind = found.walk, found.understood.kind
    told = walk.translated_step(step)
    given = found.single(told.model_output)  # some pipelines double the scheduler's sample, too
    if kind == walk.recorded_kind:
        return given
    t = walk.own.from_model_time(told.timestep.reshape(-1)[:1].double())
    return walk.own.convert(given, found.single(told.scaled), t, walk.recorded_kind, kind).to(step.model_output.dtype)


def _combined(found: Findings, calls: Sequence[NetworkCall]) -> tuple[Sequence[NetworkCall], list[Tensor]]:
    """The last calls of a step that give two answers, and these; all of them, if there are none such."""
    answers = [_answers(found, c) for c in calls]
    for skipped in range(len(calls)):
        if sum(map(len, answers[skipped:])) == 2:
            return calls[skipped:], [a for each in answers[skipped:] for a in each]
    return calls, [a for each in answers for a in each]


def _answers(found: Findings, call: NetworkCall) -> list[Tensor]:
    """The model outputs in one call's answer to one input, one per copy of the batch."""
    convention, whole = found.understood.call, found.understood.whole
    rows = len(flatten(call.arguments, whole)[convention.state])
    parts = per_copy_answer(convention, call.output, 1, max(1, rows // convention.layouts[convention.state].rows))
    return [convention.model_output(p) for p in parts]


def _with_null_conditions(found: Findings, calls: Sequence[NetworkCall]) -> Findings:
    """What is the same for every sample, but another for the null condition, belongs to the samples after all."""
    convention, whole = found.understood.call, found.understood.whole
    told = [flatten(c.arguments, whole) for c in calls]
    layouts = dict(convention.layouts)
    for path, value in convention.constants.items():
        if path in found.understood.fixed:
            continue
        guided = [t.get(path) for t in told]
        doubled = isinstance(value, Tensor) and value.dim() > 0 and isinstance(guided[0], Tensor) and guided[0].shape == (2 * len(value), *value.shape[1:])
        if doubled:
            layouts[path] = Layout("stacked", 0, len(value))
        elif len(guided) == 2 and any(not same(value, g) for g in guided):
            layouts[path] = Layout("shared")
    known = {*convention.varying, *layouts, *convention.constants}
    copies = 2 // len(calls)
    if copies == 2 and not found.batched:  # what did not double with the samples only looked as if it were theirs (two rows of positions)
        single = {k for k, v in layouts.items() if k not in convention.varying and _rows(told[0].get(k), v) == v.rows}
        layouts |= {k: Layout("shared") for k in single}
    for path, value in told[0].items():  # a mask, say, that only prompts of two lengths need
        if path not in known and isinstance(value, Tensor):
            layouts[path] = Layout("stacked", 0, max(1, len(value) // copies)) if value.dim() and len(value) % copies == 0 else Layout("shared")
    constants = {k: v for k, v in convention.constants.items() if k not in layouts and not any(path.startswith((f"{k}.", f"{k}{{")) for path in layouts)}
    return _with_call(found, layouts=layouts, constants=constants)


def _rows(value: Any, layout: Layout) -> int | None:
    """How many rows of samples a tensor has."""
    return value.shape[layout.axis] if layout.kind == "stacked" and isinstance(value, Tensor) and value.dim() else None


def _with_embedded(found: Findings, name: str, off: float, call: NetworkCall) -> Findings:
    """With the argument of the backbone that takes the guidance scale, if there is one."""
    convention, whole = found.understood.call, found.understood.whole
    if convention.embedded is not None:
        return found
    plain = flatten(found.recorded.first_calls(found.network)[-1].arguments, whole)
    for path, value in flatten(call.arguments, whole).items():
        before = plain.get(path)
        if path in convention.varying or not isinstance(value, Tensor) or not isinstance(before, Tensor):
            continue
        if value.numel() == before.numel() == 1 and float(value) != float(before):
            scale = (float(value) - float(before)) / (PROBE_GUIDANCE - off)
            affine = Affine(scale, float(before) - scale * off)
            layouts, constants = ({k: v for k, v in d.items() if k != path} for d in (convention.layouts, convention.constants))
            return _with_call(found, layouts=layouts, constants=constants, embedded=(path, affine))
    return found


def _with_call(found: Findings, **changes: Any) -> Findings:
    return replace(found, understood=replace(found.understood, call=replace(found.understood.call, **changes)))
