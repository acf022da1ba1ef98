"""A check: a measured number, the bound it must meet, and the ablation that must not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.analytic import MLPDenoiser
from distill.methods.base import Batch, Method
from distill.roles import Roles
from distill.roles import average as move_average


@dataclass(frozen=True)
class Check:
    """One line of ``distill verify``.

    Args:
        must_fail: the check is an ablation: the bound has to be missed.
    """

    subject: str
    name: str
    value: float
    low: float
    high: float
    must_fail: bool = False
    seconds: float = 0.0

    @property
    def within(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def passed(self) -> bool:
        return self.within != self.must_fail

    @property
    def bound(self) -> str:
        if self.low == -float("inf"):
            return f"≤ {self.high:.4g}"
        return f"≥ {self.low:.4g}" if self.high == float("inf") else f"{self.low:.4g} … {self.high:.4g}"


def at_most(subject: str, name: str, value: float, bound: float, must_fail: bool = False) -> Check:
    return Check(subject, name, value, -float("inf"), bound, must_fail)


def between(subject: str, name: str, value: float, low: float, high: float, must_fail: bool = False) -> Check:
    return Check(subject, name, value, low, high, must_fail)


def timed(checks: Iterator[Check]) -> Iterator[Check]:
    """The checks with the time that each took."""
    while True:
        start = time.perf_counter()
        check = next(checks, None)
        if check is None:
            return
        yield Check(**{**check.__dict__, "seconds": time.perf_counter() - start})


def train(
    method: Method, roles: Roles, batches: Callable[[int], Batch], steps: int, rates: Mapping[str, float],
    betas: tuple[float, float] = (0.9, 0.999), decay: bool = True, average: float = 0.0, until: float = 1.0,
    done: Callable[[], float] | None = None,
) -> list[Tensor]:
    """Run a method's own update rule on small networks: the trainer's loop without its machinery.

    Args:
        batches: step → batch (its progress is set here); rates: learning rate per role, decayed to zero (in each stretch of the method's) if ``decay``.
        until: the share of the training after which it stops.
        average: EMA decay of the student's parameters, which are returned (the last ones, for 0).
        done: the share of the training that is done, where that is no matter of steps (``steps`` then bounds their number); it ends at 1.
    """
    parameters: dict[str, list[nn.Parameter]] = {role: roles.parameters(role) for role in rates}
    optimizers = {role: torch.optim.Adam(p, rates[role], betas) for role, p in parameters.items()}
    student = parameters["student"]
    kept = [p.detach().clone() for p in student]
    roles.forget = lambda role: optimizers[role].state.clear()
    for step in range(steps):
        progress = step / steps if done is None else done()
        if progress >= until:
            break
        start, end = method.stretch(progress)
        for role, rate in rates.items():
            optimizers[role].param_groups[0]["lr"] = rate * ((end - progress) / (end - start) if decay else 1.0)
        for names, loss, _ in method.step(roles, replace(batches(step), progress=progress)):
            names = (names,) if isinstance(names, str) else names
            loss.backward(inputs=[p for name in names for p in parameters[name]])
            for name in names:
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
            if "student" in names:
                move_average(kept, student, average)
                if roles.target is not None and (weight := method.target_decay(progress)) < 1:
                    move_average(roles.target.parameters(), student, weight)
    return kept


@torch.no_grad()
def starting_at(student: MLPDenoiser, place: Tensor, spread: float) -> None:
    """Put an untrained student's samples at a place, in its ``data_std``, with so much of their own spread: not every mode is there."""
    last = student.net[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(spread)
    last.bias.copy_(place)


def student_loss(method: Method, roles: Roles, batch: Batch) -> Tensor:
    """The first loss of the method's step: its student's."""
    return next(iter(method.step(roles, batch)))[1]


def descend(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float, betas: tuple[float, float] = (0.8, 0.99)) -> None:
    """Take a few parameters, in place, where a loss leads them: Adam at a rate that falls to zero."""
    own = list(parameters)
    optimizer = torch.optim.Adam(own, rate, betas)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss().backward(inputs=own)
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` for a while: how an ablation takes a piece out of a method, and how a random draw is
    made a chosen one, without a second copy of the method."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖."""
    return float((value - truth).norm() / truth.norm())
