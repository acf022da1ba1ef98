"""What makes no sense: combinations of the consistency engine's settings that would train nothing, or something else than they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from distill.matching.times import scope_of

if TYPE_CHECKING:
    from distill.methods.consistency import Consistency


def refusals(method: Consistency) -> Iterator[str]:
    """One line for each: what is wrong and what to do."""
    first, last = method.discretization
    continuous, phased = method.tangent is not None, method.phased
    if not 1 <= first <= last:
        yield "discretization must be two numbers of intervals, 1 <= start <= end"
    elif last < method.steps:
        yield f"discretization ends at {last} intervals, fewer than the student's {method.steps} steps"
    if method.solver == "data" and (method.guidance_scale != 1 or method.guidance_range is not None):
        yield "solver data has no teacher that could be guided: leave out guidance, or use ddim or heun"
    if method.solver == "data" and method.trajectories is not None:
        yield "trajectories are the teacher's, and solver data has no teacher: use ddim"
    if method.guidance_range is not None and not 1 <= method.guidance_range[0] < method.guidance_range[1]:
        yield "guidance_range must be two increasing scales, the first at least 1"
    if method.times is not None and (len(method.times) != method.steps or sorted(method.times, reverse=True) != method.times):
        yield f"times must be {method.steps} descending numbers, one per step"
    if scope_of(method.train_times) is not None:
        yield "scope is for score_times: a consistency function must know every level"
    if phased and any(first % count for count in method.segments):
        yield f"discretization starts at {first} intervals, which do not fall into {', '.join(map(str, method.segments))} equal segments: use a multiple"
    if phased and (method.gap is not None or continuous):
        yield "segments are of the grid of intervals: leave out gap and tangent, or the segments"
    if continuous and (method.gap is not None or method.truncation is not None or method.target == "ema"):
        yield "tangent is the limit of no gap, with the student's own weights as the target: leave out gap, truncation and target"
    if continuous and method.solver in ("heun", "sde"):
        yield f"tangent takes no step, and solver {method.solver} has none to take: use ddim (the teacher's velocity) or data"
    if method.solver == "sde" and method.eta == 0:
        yield "eta 0 is the ODE: use solver ddim"
    if method.truncation is not None and method.target == "ema":
        yield "truncation keeps the first stage's student as the target: set target to stop_gradient"
    if method.gan is not None:
        if method.gan.features == "critic" and method.matching is None:
            yield "gan.features critic: there is no critic here: use teacher, random or projected"
        if method.gan.real == "longer":
            yield "gan.real longer is of distribution matching: use data, or target"
        if method.gan.real == "target" and (continuous or method.gan_at_start):
            yield "gan.real target needs a target, which neither a tangent nor a sample from pure noise has: use data"
        if method.gan_at_start and phased:
            yield "gan_at_start judges whole samples, and segments end at noise levels: leave one of them out"
    elif method.gan_at_start:
        yield "gan_at_start needs a gan section"
    if method.proxy is not None and (method.gan is not None or continuous or phased or method.trajectories is not None):
        yield "proxy compares x0-predictions with targets and real data, in the discriminator's place: leave out gan, tangent, segments and trajectories"
    if method.terms and any(term.needs_pairs for term in method.terms):
        yield "a regression term needs pairs, which a consistency method does not make: leave it out"
    own = method.matching
    if own is not None and (own.gan is not None or own.terms or own.real != "data" or own.objective == "none" or own.needs_ratio):
        yield "matching is a difference of scores alone: put gan and terms beside it, and leave out real and divergence"
    if own is not None and own.rollout in ("data", "any_steps", "phase"):
        yield "matching judges the student's own samples: set its rollout to backward_simulation or trajectory"
