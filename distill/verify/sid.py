"""SiD against closed forms: what each alpha is the gradient of, and where it drives a student that is too wide."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distill.analytic import AffineGenerator, gaussian
from distill.methods.distribution import DistributionMatching
from distill.methods.sid import SiD
from distill.schedule import CosineVP, NoiseSchedule
from distill.verify.core import Check, at_most, between, relative_error, replaced
from distill.verify.quadrature import LEVELS, truth, yielded

BOUND = 2e-3
OVER = 1.2  #: the paper's alpha


def exact(alpha: float, t: float) -> SiD:
    """One noise level, and the weight of the divergence itself."""
    return SiD(alpha=alpha, weighting="exact", score_times=(t, t))


def checks() -> Iterator[Check]:
    for name, (schedule, t) in LEVELS.items():
        half, one, over = (2 * yielded(exact(alpha, t), schedule) for alpha in (0.5, 1.0, OVER))
        fisher, frozen = truth(schedule, t), truth(schedule, t, frozen=True)
        yield at_most("sid", f"alpha ½ against half the Fisher divergence's gradient, {name}", relative_error(half, fisher), BOUND)
        yield at_most("sid", f"alpha 1 against half that of the frozen law, {name}", relative_error(one, frozen), BOUND)
        yield at_most("sid", f"ablation: alpha 1 against the Fisher divergence, {name}", relative_error(one, fisher), BOUND, must_fail=True)
        yield at_most("sid", f"ablation: alpha {OVER} against the frozen law, {name}", relative_error(over, frozen), BOUND, must_fail=True)
        apart = 2 * with_still_inputs(exact(0.5, t), schedule)
        yield at_most("sid", f"ablation: no gradient through x_t, {name}", relative_error(apart, fisher), BOUND, must_fail=True)
    yield from width_checks()


def with_still_inputs(method: DistributionMatching, schedule: NoiseSchedule) -> Tensor:
    """The gradient where the networks' inputs are constants."""
    moving = NoiseSchedule.add_noise
    with replaced(NoiseSchedule, "add_noise", lambda self, x0, noise, t: moving(self, x0.detach(), noise, t)):
        return yielded(method, schedule)


# -- students that are too wide -----------------------------------------------------------------------------------------


def width_checks() -> Iterator[Check]:
    """Teacher N(0, 1), student N(0, v²), both Gaussian with variances V_T, V at the noise level. The gradient in v² is

        |D_T − D_F slope| · alpha sigma² · [a/V − (a − 1)/V_T]

    up to a positive factor: for alpha a > 1 it points outwards where V > a/(a − 1) V_T, with a perfect critic too, and a student that
    a lagging critic has let swing so far is gone. No a ≤ 1 has such a place.
    """
    schedule, t = CosineVP(), 0.3
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
    width = math.sqrt((OVER / (OVER - 1) * (alpha**2 + sigma**2) - sigma**2) / alpha**2)
    found = outermost(OVER, schedule, t)
    yield between("sid", f"alpha {OVER}: width from which on it drives outwards (closed form {width:.3f})", found, 0.995 * width, 1.005 * width)
    for a, fails in ((0.5, False), (1.0, False), (OVER, True)):
        inward = [pull(a, v, schedule, t) for v in (1.5, 3.0, 10.0, 100.0)]
        name = f"{'ablation: ' if fails else ''}alpha {a:g}: widths of 1.5 to 100 that it drives outwards"
        yield at_most("sid", name, sum(g <= 0 for g in inward), 0, must_fail=fails)


def pull(alpha: float, width: float, schedule: NoiseSchedule, t: float) -> float:
    """Gradient in the width of a student N(0, width²): positive is inward."""
    return float(yielded(exact(alpha, t), schedule, gaussian(schedule, (0.0,), (1.0,)), AffineGenerator(schedule, (0.0,), (width,)))[1])


def outermost(alpha: float, schedule: NoiseSchedule, t: float) -> float:
    """The width at which the pull changes its sign, by bisection."""
    low, high = 1.1, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if pull(alpha, middle, schedule, t) > 0 else (low, middle)
    return (low + high) / 2
