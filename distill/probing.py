"""From what a pipeline was seen to do to how its backbone is called.

* What changes between two steps is the state and the time. The state is the argument in which the scheduler's sample is
  found again; the time is an affine function of the scheduler's timestep.
* What grows with the number of prompts belongs to the samples, what does not is shared.
* The model output that the scheduler is given is found again in the backbone's answer.

Everything is found by equality of recorded values (see ``arrangement.py``), never assumed from names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distill.arrangement import Arrangement, Part, View, covers, find_inside, find_part
from distill.call import REST, Affine, Call, Layout, flatten, key_path, same
from distill.denoiser import guidance_embedding
from distill.overrides import Override
from distill.recording import NetworkCall, Recording, Step
from distill.schedule import KINDS, Kind, NoiseSchedule


class NotUnderstood(Exception):
    """The one thing that could not be inferred; the message names it, and ``field`` the override that settles it."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Understanding:
    """How the backbone is called, unguided."""

    call: Call
    sample_shape: tuple[int, ...]
    copies: int  #: how many times each sample lies in one call: 2 where a pipeline always doubles its batch
    kept: int  #: which of the copies is the model output
    whole: tuple[str, ...]  #: paths of per-sample lists
    unexplained: tuple[str, ...] = ()  #: arguments that change from step to step for another reason
    kind: Kind = "x0"  #: what the backbone predicts
    fixed: tuple[str, ...] = ()  #: constants that an override has set


def understand(
    backbone: nn.Module, network: str, one: Recording, two: Recording | None, other: Recording | None, override: Override,
) -> Understanding:
    """The calling convention.

    Args:
        one: a few computed steps of one sample. two: the first call for two samples (None where that is impossible).
        other: the first call of another prompt, longer than that of ``one``.
        override: what is known of it: the argument that takes the state, arguments that are to be constant.
    """
    steps = one.steps_of(network)
    layouts, whole = _layouts(steps[0], two, other, network)
    flats = [flatten(s.calls_of(network)[-1].arguments, whole) for s in steps]
    fixed = {k: v for k, v in override.constants.items() if k in flats[0]}
    changed = [path for path in flats[0] if path not in fixed and any(not same(flats[0][path], f.get(path)) for f in flats[1:])]
    state, enter, copies, others = _state(flats, steps, layouts, [override.state] if override.state else changed, backbone, changed)
    layouts[state] = _per_copy(layouts.get(state, Layout()), copies)
    layouts = {k: _per_copy(v, copies) if k != state else v for k, v in layouts.items()}
    width = getattr(getattr(backbone, "config", None), "time_cond_proj_dim", None)
    guidance = "timestep_cond" if "timestep_cond" in inspect.signature(backbone.forward).parameters and width else None
    if guidance is not None and width is not None and not _embeds_guidance(flats[0].get(guidance), int(width)):
        guidance = None  # it takes something else: the latent upscaler's noise level
    times: dict[str, Affine] = {}
    unexplained: list[str] = []
    for path in changed:
        if path != state and path not in others:
            affine = _time(path, flats, steps, layouts)
            if affine is None:
                unexplained.append(path)
                continue
            times[path] = affine
            if layouts.get(path, Layout("shared")).kind == "shared":  # one time for all rows: a network takes one per row, too
                layouts[path] = Layout(rows=(0 if two else _times_per_sample(flats[0][path], copies)) or layouts[state].rows)
    if not times:
        raise NotUnderstood(f"no argument of {type(backbone).__name__} follows the scheduler's timesteps", "time")
    dynamic = {state, guidance, *others, *times, *layouts, *unexplained}
    layouts = {k: v for k, v in layouts.items() if k not in unexplained and k not in fixed}
    constants = {k: v for k, v in flats[0].items() if k not in dynamic} | fixed
    if "return_dict" in inspect.signature(backbone.forward).parameters:
        constants["return_dict"] = False
    plain = isinstance(enter, View) and enter.shape == tuple(one_sample(steps[0].scaled).shape[1:])
    call = Call(state, times, constants, layouts, None if plain else enter, guidance=guidance, others=others)
    return Understanding(call, tuple(one_sample(steps[0].sample).shape[1:]), copies, 0, tuple(whole), tuple(unexplained), fixed=tuple(fixed))


def _embeds_guidance(value: Any, width: int) -> bool:
    """Whether an argument for one sample may embed a guidance scale that is off."""
    if not isinstance(value, Tensor):
        return True
    rows = value.double().cpu().reshape(-1, width)
    return any(bool(((rows - guidance_embedding(torch.tensor([off]), width)).abs() < 1e-2).all()) for off in (1.0, 0.0))


def one_sample(sample: Tensor) -> Tensor:
    """What a scheduler was given for one input as (1, ...): video pipelines may give it a row per frame."""
    return sample if len(sample) == 1 else sample.unsqueeze(0)


def understand_answer(
    found: Understanding, backbone: nn.Module, network: str, one: Recording, schedule: NoiseSchedule, kind: Kind, override: Override,
) -> Understanding:
    """With where the model output lies in the backbone's answer, with which sign, and what it predicts: the scheduler's own
    kind, or one that the pipeline converts to it.

    Raises:
        NotUnderstood: if the scheduler is given something else.
    """
    steps = one.steps_of(network)
    if override.constants:  # the recorded calls had other ones
        steps = steps[:1]
    given = [(s, one_sample(s.model_output)) for s in steps]
    for tolerance in (0.0,) if found.copies == 1 else (0.0, 1e-5):  # u + 1 (c − u) is c but for rounding
        as_given = _answer(replace(found, kind=kind), network, given, tolerance)
        if as_given is not None:
            return as_given
    for other in (kind, *(k for k in KINDS if k != kind)):  # its own kind, too: some go to x0 and back, which rounds
        if all(s.model_output.shape == s.scaled.shape and len(s.sample) == 1 for s in steps):
            targets = [(s, schedule.convert(s.model_output, s.scaled, schedule.from_model_time(s.timestep).expand(len(s.sample)), kind, other)) for s in steps]
            converted = _answer(replace(found, kind=other), network, targets, tolerance=1e-4)
            if converted is not None:
                return converted
    gathered = replace(found, kind=kind, call=replace(found.call, gathered=True))
    for tolerance in (0.0, 1e-4):
        together = _answer(gathered, network, [(s, one_sample(s.model_output)) for s in steps], tolerance)
        if together is not None:
            return together
    raise NotUnderstood(f"what {type(backbone).__name__} answers is not what the scheduler is given (up to sign, place and kind of prediction)", "answer")


def feeding(unexplained: Sequence[str], flat: Mapping[str, Any], call: NetworkCall) -> dict[str, int]:
    """Which of the unexplained arguments are tensors of another network's answer: argument → number of the tensor."""
    leaves = [v for v in pytree.tree_leaves(call.output) if isinstance(v, Tensor)]
    return {path: i for path in unexplained for i, leaf in enumerate(leaves) if isinstance(flat[path], Tensor) and same(flat[path], leaf)}


# -- layouts ------------------------------------------------------------------------------------------------------------


def _layouts(first: Step, two: Recording | None, other: Recording | None, network: str) -> tuple[dict[str, Layout], list[str]]:
    """How the samples lie in each argument, from a call for one and a call for two; and the lists not to be opened."""
    a = first.calls_of(network)[-1].arguments
    layouts: dict[str, Layout] = {}
    whole: list[str] = []
    b = two.first_calls(network)[-1].arguments if two is not None and two.first_calls(network) else None

    def visit(x: Any, y: Any, path: str) -> None:
        if isinstance(x, Tensor):
            if isinstance(y, Tensor) and x.dim() == y.dim():
                axis = next((d for d in range(x.dim()) if y.shape[d] == 2 * x.shape[d] and _same_but(x, y, d)), None)
                if axis is not None:
                    layouts[path] = Layout("stacked", axis, x.shape[axis])
            elif b is None and x.dim() and len(x) in (1, 2, 3) and x.dim() > 1:
                layouts[path] = Layout("stacked", 0, len(x))
        elif isinstance(x, Mapping) and x:
            for key, inner in x.items():
                visit(inner, y.get(key) if isinstance(y, Mapping) else None, key_path(path, key))
        elif type(x) in (list, tuple) and x:
            doubled = isinstance(y, (list, tuple)) and len(y) == 2 * len(x)
            if doubled or (b is None and isinstance(x, list) and len(x) == 1 and isinstance(x[0], (Tensor, list, tuple))):
                nested = all(isinstance(e, (list, tuple)) and len(e) == 1 and isinstance(e[0], Tensor) for e in x)
                layouts[path] = Layout("nested" if nested else "listed", 0, len(x))
                whole.append(path)
            else:
                left, right = "[]" if isinstance(x, list) else "()"
                for i, inner in enumerate(x):
                    visit(inner, y[i] if isinstance(y, (list, tuple)) and len(y) == len(x) else None, f"{path}{left}{i}{right}")

    for key, value in a.items():
        visit(value, b.get(key) if b is not None else None, key)
    if other is not None and other.first_calls(network):  # what another prompt changes beyond the batch is shared by a call
        mine, theirs = flatten(a, whole), flatten(other.first_calls(network)[-1].arguments, whole)
        for path, value in mine.items():
            if path not in layouts and path in theirs and not same(value, theirs[path]):
                layouts[path] = Layout("shared")
    return layouts, whole


def _same_but(x: Tensor, y: Tensor, axis: int) -> bool:
    return all(x.shape[d] == y.shape[d] for d in range(x.dim()) if d != axis)


def _per_copy(layout: Layout, copies: int) -> Layout:
    return replace(layout, rows=max(1, layout.rows // copies))


def copies_of(arguments: Mapping[str, Any], layouts: Mapping[str, Layout], copies: int) -> list[dict[str, Any]]:
    """The flat arguments of a call with a doubled batch as those of single ones."""
    if copies == 1:
        return [dict(arguments)]
    singles: list[dict[str, Any]] = [{} for _ in range(copies)]
    for path, value in arguments.items():
        layout = layouts.get(path)
        for i, single in enumerate(singles):
            if layout is None or layout.kind == "shared" or (isinstance(value, Tensor) and not value.dim()):
                single[path] = value
            elif layout.kind in ("listed", "nested"):
                n = len(value) // copies
                single[path] = value[i * n : (i + 1) * n]
            else:
                parts = value.chunk(copies, layout.axis)
                single[path] = parts[i] if len(parts) == copies else value  # not doubled with the rest
    return singles


# -- state and time -----------------------------------------------------------------------------------------------------


def _state(
    flats: Sequence[Mapping[str, Any]], steps: Sequence[Step], layouts: Mapping[str, Layout], candidates: Sequence[str], backbone: nn.Module,
    changed: Sequence[str],
) -> tuple[str, Arrangement, int, dict[str, Arrangement]]:
    """(path, arrangement, copies, none): the argument in which the scheduler's sample is found again; or one that takes a part
    of it, and those that take the other parts."""
    for path in candidates:
        rows = layouts.get(path, Layout()).rows
        for copies in [n for n in (3, 2) if rows % n == 0] + [1]:  # a batch that is doubled is not one sample and something else
            found = [_find_state(path, copies, i, flats, steps, layouts) for i in range(copies)]
            if found[0] is not None and None not in found:
                return path, found[0], copies, {}
    parts = {path: part for path in candidates if (part := _find_state(path, 1, 0, flats, steps, layouts, find_part)) is not None}
    if parts and covers(list(parts.values()), one_sample(steps[0].scaled)):
        first, *_ = parts
        return first, parts.pop(first), 1, parts
    raise NotUnderstood(
        f"the scheduler's sample was found in no argument of {type(backbone).__name__} (changing from step to step: {', '.join(changed) or 'none'})", "state",
    )


def _find_state(
    path: str, copies: int, which: int, flats: Sequence[Mapping[str, Any]], steps: Sequence[Step], layouts: Mapping[str, Layout],
    find: Callable[[Tensor, Tensor], Arrangement | None] = find_inside,
) -> Arrangement | None:
    layout = layouts.get(path, Layout())
    arrangement = None
    for flat, step in zip(flats, steps, strict=True):
        scaled = one_sample(step.scaled)
        try:
            single = copies_of({path: flat[path]}, {path: layout}, copies)[which][path]
            entries = _per_copy(layout, copies).split(single, 1)
            target = torch.stack(entries) if isinstance(entries, list) else entries
        except (RuntimeError, TypeError, AttributeError, IndexError):
            return None
        if not isinstance(target, Tensor) or not target.is_floating_point() or len(target) != 1:
            return None
        if arrangement is None:
            arrangement = find(scaled, target)
            if arrangement is None:
                return None
        if not torch.equal(arrangement(scaled.to(target.dtype), target), target):
            return None
    return arrangement


def _time(path: str, flats: Sequence[Mapping[str, Any]], steps: Sequence[Step], layouts: Mapping[str, Layout]) -> Affine | None:
    """The argument as an affine function of the scheduler's timestep; None if it is not one."""
    values = []
    for flat in flats:
        value = flat[path]
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        layout = layouts.get(path)
        if layout is not None and layout.kind in ("listed", "nested"):
            value = torch.as_tensor(layout.split(value, len(value))[0])
        if not isinstance(value, Tensor):
            return None
        if layout is not None and layout.kind == "stacked":
            value = value.movedim(layout.axis, 0)[0]
        elif value.dim() == 1 and bool((value == value[0]).all()):
            value = value[0]
        values.append(value.double())
    timesteps = [float(s.timestep.reshape(-1)[0]) for s in steps]
    low, high = min(range(len(steps)), key=timesteps.__getitem__), max(range(len(steps)), key=timesteps.__getitem__)
    if timesteps[low] == timesteps[high]:
        return None
    scale = (values[high] - values[low]) / (timesteps[high] - timesteps[low])
    shift = values[high] - scale * timesteps[high]
    precise = all(v.dtype in (torch.float32, torch.float64, torch.int64, torch.int32) for f in flats if isinstance(v := f[path], Tensor))
    tolerance = 1e-4 if precise else 2e-2
    size = max(float(v.abs().max()) for v in values) or 1.0
    if any(float((scale * t + shift - v).abs().max()) > tolerance * size for t, v in zip(timesteps, values, strict=True)):
        return None
    if bool((scale.abs() < 1e-12).all()):
        return None
    if scale.dim() and bool((scale == scale.reshape(-1)[0]).all()) and scale.numel() == 1:
        return Affine(_rounded(float(scale)) * torch.ones(scale.shape, dtype=torch.float64), _rounded(float(shift.reshape(-1)[0])))
    if scale.dim():
        return Affine(scale, _rounded(float(shift.reshape(-1)[0])))
    return Affine(_rounded(float(scale)), _rounded(float(shift)))


def _times_per_sample(value: Any, copies: int) -> int:
    """How often one time is said for one sample: once for each token, by some; 0 where it is said once."""
    rows = len(value) // copies if isinstance(value, Tensor) and value.dim() == 1 else 1
    return rows if rows > 1 else 0


def _rounded(x: float) -> float:
    """Without the noise of the recording's precision: scales are 1, 1/1000 and the like."""
    if abs(x) < 1e-6:
        return 0.0
    near = float(f"{x:.4g}")
    return near if abs(near - x) <= 1e-5 * max(abs(near), 1e-2) else x


# -- answer -------------------------------------------------------------------------------------------------------------


def _answer(found: Understanding, network: str, targets: Sequence[tuple[Step, Tensor]], tolerance: float = 0.0) -> Understanding | None:
    """Where the targets lie in the backbone's answers, and with which sign; None if they do not."""
    answers = [per_copy_answer(found.call, step.calls_of(network)[-1].output, 1, found.copies) for step, _ in targets]
    if found.copies == 2:  # guidance of one, which pipelines compute all the same: u + 1 · (c − u) is c but for rounding
        answers = [[*parts, parts[1] + (parts[0] - parts[1]), parts[0] + (parts[1] - parts[0])] for parts in answers]
    for kept in range(len(answers[0])):
        for sign in (1.0, -1.0):
            arrangement: Arrangement | None = None
            for parts, (_, target) in zip(answers, targets, strict=True):
                answer, wanted = parts[kept], (sign * target).to(parts[kept].dtype)
                if tolerance and answer.shape == wanted.shape:
                    arrangement = View(tuple(wanted.shape[1:])) if _close(answer, wanted, tolerance) else None
                elif tolerance and answer.dim() == wanted.dim() and answer[:, : wanted.shape[1]].shape == wanted.shape:  # channels that are not used
                    part = Part(1, 0, wanted.shape[1], tuple(wanted.shape[1:]))
                    arrangement = part if _close(part(answer), wanted, tolerance) else None
                else:
                    arrangement = arrangement or find_part(answer[:1], wanted[:1])
                    if arrangement is not None and not torch.equal(arrangement(answer), wanted):
                        arrangement = None
                if arrangement is None:
                    break
            if arrangement is not None:
                plain = isinstance(arrangement, View) and arrangement.shape == tuple(answer.shape[1:])
                return replace(found, kept=kept % found.copies, call=replace(found.call, leave=None if plain else arrangement, sign=sign))
    return None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def per_copy_answer(call: Call, output: Any, batch: int, copies: int) -> list[Tensor]:
    """A backbone's answer to a doubled batch as answers (batch, ...) to single ones; rows of one sample together."""
    value = call.tensor(output, batch * copies)
    parts = []
    for part in value.chunk(copies):
        rows = len(part) // batch
        parts.append(part if rows == 1 else part.reshape(batch, rows, *part.shape[1:]))
    return parts


def values_of(arguments: Mapping[str, Any], found: Understanding, batch: int) -> dict[str, Tensor | list[Any]]:
    """The condition (one entry per sample) in the flat arguments of a call that holds one copy of the batch."""
    call = found.call
    dynamic = {*call.varying, *((call.embedded[0],) if call.embedded else ())}
    values = {path: layout.split(arguments[path], batch) for path, layout in call.layouts.items() if path not in dynamic and path in arguments}
    if call.enter is not None and call.enter.needs_rest():
        entries = call.layouts.get(call.state, Layout()).split(arguments[call.state], batch)
        values[REST] = torch.stack(entries) if isinstance(entries, list) else entries
    return values
