"""Which sample of the student is judged: where its network's input comes from, and at what noise level its output is.

    backward_simulation  x0 after a random number of the student's own steps, re-noised between them as at inference (DMD2)
    trajectory           the point that a deterministic (DDIM) rollout has reached after a random step: noisy but for the last (TDM)
    phase                where a deterministic rollout enters the next phase: after a random number of this phase's steps, the last one going
                         all of the way; noisy but for the last phase (Phased DMD)
    any_steps            x0 of a whole sample in a random number of steps, up to the ladder's length (ASD)
    data                 x0 from real data noised to a random time of the ladder (LADD): inputs that inference never has

Gradients flow through the last ``gradient_steps`` calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser

Rollout = Literal["backward_simulation", "trajectory", "phase", "any_steps", "data"]
ODE: tuple[Rollout, ...] = ("trajectory", "phase")  #: without fresh noise


@dataclass(frozen=True)
class Sample:
    """What the student made."""

    x: Tensor  #: (batch, ...) judged, with gradient: clean, or at noise level s
    x0: Tensor  #: (batch, ...) the clean sample that it leads to, with gradient
    s: Tensor | None = None  #: (batch,) t of x; None: clean
    steps: int = 1  #: network calls of the whole sample: for ``any_steps``
    start: Tensor | None = None  #: (batch,) t of the last call's input: for ``trajectory``


def roll_out(
    student: Denoiser, kind: Rollout, ladder: Sequence[float], noise: Tensor, condition: Condition, data: Tensor | None = None,
    gradient_steps: int = 1, steps: int | None = None, odds: Sequence[float] | None = None, within: tuple[int, int] | None = None,
) -> Sample:
    """A sample of the student, with gradient through its last calls.

    Args:
        ladder: the student's times, descending.
        noise: (batch, ...), unit variance.
        data: (batch, ...) real samples, for ``data``.
        steps: for ``any_steps``: the number of steps; drawn if not given.
        odds: relative probability of each step of the ladder to be the one that is judged (of each number of steps, for ``any_steps``).
        within: for ``phase``: the first step of it, and that of the next one; all of the ladder if not given.
    """
    schedule = student.schedule

    def at(time: float) -> Tensor:
        return torch.full((len(noise),), time, dtype=torch.float64, device=noise.device)

    if kind == "data":
        assert data is not None
        entry = at(ladder[_drawn(len(ladder), odds)])
        x0 = student(schedule.add_noise(data, noise, entry), entry, condition)
        return Sample(x0, x0)
    if kind == "any_steps":
        n = 1 + _drawn(len(ladder), odds) if steps is None else steps
        ladder = [ladder[i * len(ladder) // n] for i in range(n)]
        first, last = 0, n - 1
    else:
        first, end = within or (0, len(ladder))
        last = first + _drawn(end - first, None if odds is None else odds[first:end])
    x_t = noise * schedule.initial_scale
    for i, time in enumerate(ladder[: last + 1]):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first and i > last - gradient_steps):
            x0 = student(x_t, at(time), condition)
            if i == last:
                break
            following = at(ladder[i + 1])
            x_t = schedule.ddim(x_t, x0, at(time), following) if kind in ODE else schedule.add_noise(x0, torch.randn_like(x0), following)
    start, goal = at(ladder[last]), end if kind == "phase" else last + 1
    if kind in ODE and goal < len(ladder):
        s = at(ladder[goal])
        return Sample(schedule.ddim(x_t, x0, start, s), x0, s, last + 1, start)
    return Sample(x0, x0, None, last + 1, start)


def _drawn(count: int, odds: Sequence[float] | None) -> int:
    """A random whole number below a count; none is drawn where there is no choice."""
    if count == 1:
        return 0
    return int(torch.randint(count, ())) if odds is None else int(torch.multinomial(torch.tensor(odds), 1))
