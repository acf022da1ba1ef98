"""Pipelines that scale the scheduler's sample, or convert the network's answer, in their own loop: found by equality.

1. Some argument is *proportional* to the scheduler's sample at each recorded step, with another factor at each.
2. The factors follow from one of the scheduler's possible schedules and one of the usual norms (``walk.NORMS``).
3. Told the steps in the network's own space (``Walk.translated``), ``probing.py`` finds the time argument to be an affine
   function of one of the usual clocks, and the answer to be one of the kinds of prediction: or the guess was wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.arrangement import views
from distill.call import flatten, same
from distill.overrides import Override
from distill.probing import NotUnderstood, Understanding, one_sample, per_copy_answer, understand, understand_answer
from distill.recording import Recording, Step
from distill.schedule import Kind, NoiseSchedule, double, from_scheduler
from distill.walk import CLOCKS, NORMS, Rescaled, VarianceExploding, Walk

ENOUGH_STEPS = 40  #: of a run that shows how the pipeline converts near clean data


def find_preconditioned(
    backbone: nn.Module, network: str, one: Recording, two: Recording | None, other: Recording | None, override: Override,
) -> tuple[Understanding, Walk, Recording] | None:
    """The calling convention in the backbone's own space, that space, and the recording told in it; None if there is none.

    Args:
        backbone, network, one, two, other, override: as of ``probing.understand``.
    """
    steps = one.steps_of(network)
    for states, scales in proportional(network, steps):
        for walk in walks(one.scheduler, steps, scales):
            told = iter([walk.translated_step(s, x) for s, x in zip(steps, states, strict=True)])
            translated = replace(one, steps=[next(told) if s.calls_of(network) else s for s in one.steps])
            try:
                understood = understand(backbone, network, translated, two, other, override)
                return understand_answer(understood, backbone, network, translated, walk.own, walk.recorded_kind, override), walk, translated
            except NotUnderstood:
                continue
    return None


def proportional(network: str, steps: Sequence[Step]) -> Iterator[tuple[list[Tensor], list[float]]]:
    """The states in the shape of the scheduler's samples, and their factors, for each argument that is proportional to them."""
    flats = [flatten(s.calls_of(network)[-1].arguments) for s in steps]
    for path, value in flats[0].items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim() or all(same(value, f.get(path)) for f in flats[1:]):
            continue
        for copies in (1, 2, 3):
            found = [inside(one_sample(s.scaled), f[path].chunk(copies)[0]) for s, f in zip(steps, flats, strict=True)]
            known = [f for f in found if f is not None]
            if len(known) == len(steps):
                yield [x.reshape(s.sample.shape) for (x, _), s in zip(known, steps, strict=True)], [scale for _, scale in known]
                break


def inside(source: Tensor, target: Tensor) -> tuple[Tensor, float] | None:
    """(part of the target in the source's shape, its factor): where a target (1, ...) holds a multiple of the source (1, ...),
    in one piece or in another order."""
    if target.numel() == source.numel():
        plain = target.reshape(source.shape)
        ordered = torch.empty(source.numel(), dtype=target.dtype, device=target.device)
        ordered[source.flatten().argsort()] = target.flatten().sort().values
        candidates = [plain, ordered.reshape(source.shape)]
    elif target.numel() > source.numel() and target.dim() and len(target) == len(source):
        candidates = []
        for view in views(source, target):
            dim = next(d for d in range(target.dim()) if view.shape[d] != target.shape[d])
            candidates += [target.narrow(dim, i, view.shape[dim]).reshape(source.shape) for i in range(target.shape[dim] - view.shape[dim] + 1)]
    else:
        return None
    for candidate in candidates:
        scale = factor(source, candidate)
        if scale is not None:
            return candidate.clone(), scale
    return None


def factor(source: Tensor, target: Tensor) -> float | None:
    """c with target = c · source, by least squares; None if there is none."""
    a, b = double(source), double(target)
    c = float((a * b).sum() / (a * a).sum())
    tolerance = 1e-5 if target.dtype in (torch.float32, torch.float64) else 2e-2
    return c if c > 0 and float((b - c * a).abs().max()) <= tolerance * float(b.abs().max()) else None


def walks(scheduler: Any, steps: Sequence[Step], scales: Sequence[float]) -> Iterator[Walk]:
    """The pairs of schedules that explain the factors, with every clock."""
    for schedule, kind in schedules(scheduler):
        for by_sigma in (False, True) if all(s.sigma is not None for s in steps) else (False,):
            plain = Walk(schedule, kind, schedule, by_sigma=by_sigma)
            t = torch.stack([plain.at(s.timestep.reshape(-1)[0].double().cpu(), s.sigma) for s in steps])
            for norm in NORMS:
                for unit in dict.fromkeys((1.0, schedule.data_scale)):
                    ratio = Rescaled(schedule, norm, "share").ratio(t) / unit
                    if bool(((ratio - torch.tensor(scales)).abs() <= 1e-3 * ratio.abs()).all()):
                        yield from (replace(plain, own=Rescaled(schedule, norm, clock, unit), unit=unit) for clock in CLOCKS)


def schedules(scheduler: Any) -> Iterator[tuple[NoiseSchedule, Kind]]:
    """What a scheduler's samples may be: what its class says; or, where it goes along sigma in straight lines (as Euler's rule
    for a flow does), clean data + sigma · noise."""
    sigmas, config = getattr(scheduler, "sigmas", None), scheduler.config
    if isinstance(sigmas, Tensor) and len(sigmas) > 1:
        known = {k: config.get(k) for k in ("sigma_min", "sigma_max")}
        positive = sigmas[sigmas > 0]
        low, high = float(known["sigma_min"] or positive.min()), float(known["sigma_max"] or positive.max())
        scale = float(scheduler.timesteps[0]) / float(sigmas[0])
        straight = torch.allclose(scheduler.timesteps.double().cpu(), scale * sigmas[: len(scheduler.timesteps)].double().cpu(), rtol=1e-4)
        if straight and low < high:
            yield VarianceExploding(low, high, float(config.get("rho", 7.0)), scale), "eps"
    try:
        yield from_scheduler(scheduler)
    except ValueError:
        return


# -- conversions that are not exact everywhere --------------------------------------------------------------------------


def find_floor(walk: Walk, found: Understanding, network: str, recording: Recording) -> float:
    """The least sigma that the pipeline divides by when it turns its network's answer into the scheduler's kind; 0: none.

    Args:
        recording: a run to the end, in which the network may repeat its first answer.

    Raises:
        NotUnderstood: if it departs from the exact conversion in another way.
    """
    floors, answer = [], None
    for step in recording.steps_of(network):
        call = step.calls_of(network)[-1]
        answer = call.output if call.output is not None else answer
        said = found.call.model_output(per_copy_answer(found.call, answer, 1, found.copies)[found.kept])
        t = walk.at(step.timestep.reshape(-1)[:1])
        sigma = float(walk.schedule.sigma(t.double()))
        exact = walk.schedule.convert(said, one_sample(step.scaled), t, found.kind, walk.kind)
        if not sigma or not bool(exact.isfinite().all()):
            continue
        share = factor(exact.float(), walk.sign * one_sample(step.model_output).float())
        if share is None:
            raise NotUnderstood(f"near clean data the answer is turned into the scheduler's {walk.kind} in another way", "answer")
        if share < 1 - 1e-3:
            floors.append(sigma / share)
    if floors and max(floors) - min(floors) > 1e-3 * max(floors):
        raise NotUnderstood(f"near clean data the answer is turned into the scheduler's {walk.kind} in another way", "answer")
    return float(f"{sum(floors) / len(floors):.4g}") if floors else 0.0
