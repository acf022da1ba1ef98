"""Flow maps: X(x, t → s) carries a state along the probability-flow ODE from t to s, in one network call.

Every schedule is a straight one in coordinates of its own. With c = alpha + sigma, z = x/c and the clock tau = sigma/c,

    z = (1 − tau) x0 + tau noise,     dz/dtau = noise − x0 = the prediction kind ``flow``,

so that a network's reading U as ``flow``, told t and s, is an average velocity, and

    X(x, t → s) = c_s (x/c_t + (tau_s − tau_t) U(x, t, s))        = alpha_s x0 + sigma_s eps with the network's own x0 and eps (DDIM)

    flow matching   x + (s − t) U                            (MeanFlow's, shortcut models', Boffi et al.'s)
    EDM             (sigma_s/sigma_t) x + (1 − sigma_s/sigma_t) G,   G the x0-prediction    (CTM's)
    VP              (sigma_s/sigma_t) x + (alpha_s − alpha_t sigma_s/sigma_t) G

For any weights X(x, t → t) = x, and d/ds X at s = t is the velocity of G(x, t, t): on its diagonal the network is a denoiser. The form with U
divides by nothing that vanishes, neither at t = 0 nor at alpha = 0, and leads up (s > t) as well as down.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.schedule import NoiseSchedule, double, expand_to


def clock(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tau, c, d tau/dt) at t (batch,), float64."""
    alpha, sigma = schedule.alpha_sigma(double(t))
    d_alpha, d_sigma = schedule.derivatives(double(t))
    c = alpha + sigma
    return sigma / c, c, (alpha * d_sigma - sigma * d_alpha) / c**2


def average_velocity(network: Denoiser, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
    """U(x, t, s): what the network says at (x, t), told the end s, as noise − x0; (batch, ...)."""
    return network.predict(x, t, (condition or Condition()).ending(s)).as_kind("flow")


def moved(schedule: NoiseSchedule, x: Tensor, t: Tensor, s: Tensor, velocity: Tensor) -> Tensor:
    """X from the average velocity; x itself, to the bit, where s = t."""
    (tau_t, c_t, _), (tau_s, c_s, _) = clock(schedule, t), clock(schedule, s)
    return (expand_to(c_s / c_t, x) * double(x) + expand_to(c_s * (tau_s - tau_t), x) * velocity).to(x.dtype)


def jump(network: Denoiser, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
    """X(x, t → s) of a network that is told s; (batch, ...) and (batch,) times."""
    return moved(network.schedule, x, t, s, average_velocity(network, x, t, s, condition))


@torch.no_grad()
def invert(student: Denoiser, times: Sequence[float], x0: Tensor, condition: Condition | None) -> Tensor:
    """The noise (batch, ...), of unit variance, from which a deterministic sample along the descending ``times`` is x0: the ladder
    climbed from the data, for students that were trained to go up (``pairs.backward``)."""
    schedule, state = student.schedule, x0
    lowest = schedule.t_min if student.kind in ("x0", "score") else 0.0  # where noise cannot be read from an x0-prediction
    for now, after in pairwise((lowest, *reversed(times))):
        t, s = (torch.full((len(x0),), time, dtype=torch.float64, device=x0.device) for time in (now, after))
        state = jump(student, state, t, s, condition)
    return state / schedule.initial_scale
