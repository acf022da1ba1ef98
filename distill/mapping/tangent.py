"""Consistency in continuous time: the limit of no step between t and s, in TrigFlow's coordinates (Lu & Song 2024, arXiv 2410.11081).

Any schedule is TrigFlow's under the angle phi at which the signal-to-noise ratios agree, and the factor that goes with it:

    tan phi = sigma / (alpha sd),    x = x_t / rho,  rho² = alpha² + (sigma/sd)²,    x = cos phi x0 + sin phi sd noise

A network of any kind, in any schedule, is then f(x, phi) = D = cos phi x − sin phi F with the field F = −sin phi D + cos phi sd eps_hat:
no training turns a flow-matching or EDM teacher into a TrigFlow one (SANA-Sprint: Chen et al. 2025, arXiv 2503.09641, sec. 3.1), and
its own call is unchanged. The teacher's F_T is dx/dphi along its ODE, where the tangent is

    g = cos phi df/dphi = −cos² phi (F − F_T) − r cos phi sin phi (x + dF/dphi),         r: 0 → 1 over the warm-up

with one forward-mode derivative, in which cos phi sin phi is folded so that nothing diverges at phi = π/2. The loss

    L = E ‖F_θ − sg[F + ĝ]‖² / E[‖·‖² | phi],       ĝ = √d g / (‖g‖ + c)

moves F along g. Its weight is the paper's learnt one: exp(l) = E[loss | phi] minimises E[loss / exp(l) + l], and is kept as a
running mean in bins of phi in place of a head that has to find it. (The paper's prior weight, 1/(sd tan phi), cancels.)
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction
from distill.jvp import Mode, jvp
from distill.schedule import NoiseSchedule, double, expand_to

Share = Annotated[float, Field(ge=0, le=1)]
LEAST = 0.1  #: of the running mean that the loss is divided by: levels that are learnt already do not drown the others


class Tangent(BaseModel):
    """Settings of the continuous-time loss."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    c: Annotated[float, Field(gt=0)] | None = 0.1  #: of the normalisation of g; null: none
    warmup: Share = 0.1  #: part of the training in which r rises to 1
    calm_down: tuple[Share, Share] | None = None  #: (from this part of the training on r falls linearly, to this at the end): TBCM
    data_std: Annotated[float, Field(gt=0)] = 1.0  #: sd, the data's standard deviation
    adaptive: bool = True  #: divide by the running mean of the loss at each noise level
    bins: Annotated[int, Field(ge=2)] = 32  #: of that
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.95  #: and its decay
    derivative: Mode = "auto"  #: exact (forward mode) where the network has it, else central differences

    @model_validator(mode="after")
    def _possible(self) -> Tangent:
        if self.calm_down is not None and self.calm_down[0] >= 1:
            raise ValueError("calm_down starts at the end of the training: give a part of it below 1, or leave it out")
        return self

    def strength(self, progress: float) -> float:
        """r."""
        up = min(1.0, progress / self.warmup) if self.warmup else 1.0
        if self.calm_down is None or progress <= self.calm_down[0]:
            return up
        start, last = self.calm_down
        return up * (1 + (last - 1) * (progress - start) / (1 - start))


def angle(schedule: NoiseSchedule, t: Tensor, data_std: float) -> Tensor:
    """phi of t, (batch,), float64."""
    alpha, sigma = schedule.alpha_sigma(double(t))
    return torch.atan2(sigma / data_std, alpha)


def circle(schedule: NoiseSchedule, x: Tensor, t: Tensor, data_std: float) -> tuple[Tensor, Tensor, Tensor]:
    """(cos phi, sin phi, rho), shaped to multiply x."""
    alpha, sigma = schedule.coefficients(x, t)
    rho = (alpha**2 + (sigma / data_std) ** 2).sqrt()
    return alpha / rho, sigma / data_std / rho, rho


def angular_speed(schedule: NoiseSchedule, x: Tensor, t: Tensor, data_std: float) -> Tensor:
    """dphi/dt, shaped to multiply x."""
    (alpha, sigma), slopes = schedule.coefficients(x, t), schedule.derivatives(double(t.to(x.device)))
    d_alpha, d_sigma = (expand_to(d, x) for d in slopes)
    return (alpha * d_sigma - sigma * d_alpha) / data_std / (alpha**2 + (sigma / data_std) ** 2)


def field(prediction: Prediction, data_std: float) -> Tensor:
    """F (times sd) of what a network said, (batch, ...) in the state's precision."""
    x_t, t, schedule = prediction.x_t, prediction.t, prediction.schedule
    cos, sin, _ = circle(schedule, x_t, t, data_std)
    x0, eps = (schedule.convert(prediction.value, x_t, t, prediction.kind, kind) for kind in ("x0", "eps"))
    return (cos * data_std * eps - sin * x0).to(torch.float64 if x_t.dtype == torch.float64 else torch.float32)


def straight_field(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor, data_std: float) -> Tensor:
    """dx/dphi on the line of a real sample and its noise: F_T without a teacher (sCT), right on average."""
    cos, sin, _ = circle(schedule, x0, t, data_std)
    return (cos * data_std * noise - sin * x0).to(x0.dtype)


def tangent(
    student: Denoiser, truth: Tensor, x_t: Tensor, t: Tensor, condition: Condition | None, strength: float, settings: Tangent
) -> tuple[Tensor, Tensor]:
    """(F, g), without gradient.

    Args:
        truth: F_T, dx/dphi of the trajectory through x_t.
        strength: r.
    """
    schedule, sd = student.schedule, settings.data_std
    cos, sin, rho = circle(schedule, x_t, t, sd)
    x = double(x_t) / rho
    # The trajectory in the schedule's own coordinates: dx_t/dt of x_t = rho x, with D_T and eps_T from F_T and x.
    d_alpha, d_sigma = (expand_to(d, x_t) for d in schedule.derivatives(double(t.to(x_t.device))))
    x0_true, noise_true = cos * x - sin * truth, (sin * x + cos * truth) / sd
    pace = cos * sin / angular_speed(schedule, x_t, t, sd)  # of t, for a pace of cos phi sin phi in phi
    v_x = (d_alpha * x0_true + d_sigma * noise_true) * pace

    def said(state: Tensor, time: Tensor) -> Tensor:
        return field(student.predict(state, time, condition), sd)

    value, derivative = jvp(said, [x_t, double(t)], [v_x.to(x_t), pace.flatten()], settings.derivative, owner=student)
    g = -(cos**2) * (value - truth) - strength * (cos * sin * x + derivative)
    return value, g.to(value)


def normalized(g: Tensor, c: float | None) -> Tensor:
    """√d g / (‖g‖ + c): the paper's direction, of a size that does not depend on the number of elements d."""
    if c is None:
        return g
    flat = g.flatten(1)
    size = expand_to(flat.norm(dim=1), g)
    return g * flat.shape[1] ** 0.5 / (size + c)


def leveled(loss: Tensor, phi: Tensor, means: Tensor, memory: float) -> Tensor:
    """(batch,) losses over their running mean at each noise level; ``means`` (bins,), zero where nothing has been seen, changes in place."""
    index = (phi / (torch.pi / 2) * len(means)).long().clamp(0, len(means) - 1)
    with torch.no_grad():
        now = loss.detach().to(means)
        count = torch.zeros_like(means).index_add(0, index, torch.ones_like(now))
        mean = torch.zeros_like(means).index_add(0, index, now) / count.clamp_min(1)
        blended = torch.where(means == 0, mean, torch.lerp(mean, means, memory))
        means.copy_(torch.where(count > 0, blended, means))
        weight = 1 / (means[index] + LEAST)
    return weight.to(loss) * loss
