"""Consistency distillation: one evaluation gives what the probability-flow ODE gives.

    CD   Song, Dhariwal, Chen, Sutskever 2023, arXiv 2303.01469
    LCM  Luo et al. 2023, arXiv 2310.04378 (guided ODE, guidance as an input)
    iCT  Song & Dhariwal 2023, arXiv 2310.14189 (pseudo-Huber, doubling discretisation, weights)
    ECT  Geng et al. 2024, arXiv 2406.14548 (consistency tuning: real data in the solver's place, from the teacher's weights)

On a grid 0 = t_0 < … < t_N = 1 the student f is trained to agree with itself at two neighbouring points of one
trajectory of the (guided) teacher:

    L = w d( f(x_t, t), sg f⁻(x_s, s) ),     x_s = one solver step of the teacher from (x_t, t) to s,     f(x, 0) = x.

or, with real data in the solver's place, x_s = alpha_s x0 + sigma_s noise with the x0 and the noise of x_t: an unbiased
estimate of the step that the exact score would take, so that the student's law goes to the data's and not to the teacher's.

f is the student's x0-prediction for t > 0; the boundary f(x, 0) = x is a hard switch on the target's side, exact for any
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.guidance import Guided
from distill.losses.metrics import METRICS, Metric
from distill.methods.base import Batch, Method, Update
from distill.roles import Roles
from distill.sampling import Sampler, uniform_ladder
from distill.schedule import NoiseSchedule

Weighting = Literal["uniform", "inverse_gap", "inverse_noise"]


class Consistency(Method):
    """Consistency distillation (CD, LCM)."""

    name: Literal["consistency"] = "consistency"

    steps: Annotated[int, Field(ge=1, le=8)] = 4  #: the most network calls that the student is sampled with
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  #: w of the teacher's ODE; 1 is off
    guidance_range: tuple[float, float] | None = None  #: w ~ U[low, high] per sample, told to the student (LCM)
    guidance_embedding_width: Annotated[int, Field(ge=2)] = 256
    discretization: Annotated[tuple[int, int], Field()] = (50, 50)  #: grid intervals N at the start and at the end
    solver: Literal["ddim", "heun", "data"] = "ddim"  #: of the step from t to s; data: none, x_s on the line between x0 and noise
    metric: Metric = "pseudo_huber"
    target: Literal["ema", "stop_gradient"] = "ema"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95  #: of the target
    weighting: Weighting = "uniform"

    @model_validator(mode="after")
    def _possible(self) -> Consistency:
        first, last = self.discretization
        if not 1 <= first <= last:
            raise ValueError("discretization must be two numbers of intervals, 1 <= start <= end")
        if last < self.steps:
            raise ValueError(f"discretization ends at {last} intervals, fewer than the student's {self.steps} steps")
        if self.solver == "data" and (self.guidance_scale != 1 or self.guidance_range is not None):
            raise ValueError("solver data has no teacher that could be guided: leave out guidance, or use ddim or heun")
        if self.guidance_range is not None and not 1 <= self.guidance_range[0] < self.guidance_range[1]:
            raise ValueError("guidance_range must be two increasing scales, the first at least 1")
        return self

    @property
    def roles(self) -> Sequence[str]:  # type: ignore[override]
        return ("student", "target") if self.target == "ema" else ("student",)

    def needs_images(self) -> bool:
        return True

    def guidance_embedding(self) -> int:
        return self.guidance_embedding_width if self.guidance_range is not None else 0

    def target_decay(self, progress: float) -> float:
        return self.ema_decay

    def sampler(self) -> Sampler:
        return Sampler(uniform_ladder(self.steps), self.steps, self.guidance_scale, self.guidance_range)

    def intervals(self, progress: float) -> int:
        """N: doubled at equal spans of training from the first to the last value (iCT, sec. 3.4)."""
        first, last = self.discretization
        doublings = math.ceil(math.log2(last / first))
        return min(first << int(progress * (doublings + 1)), last)

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        x0, condition = batch.x0, self._told(batch)
        assert x0 is not None
        n = self.intervals(batch.progress)
        i = torch.randint(n, (len(x0),), device=x0.device)
        t, s = (i + 1).double() / n, i.double() / n
        x_t = roles.schedule.add_noise(x0, batch.noise, t)
        with torch.no_grad():
            if self.solver == "data":
                x_s = straight_step(roles.schedule, x0, batch.noise, s)
            else:
                x_s = solver_step(Guided(roles.teacher, self.guidance_scale), x_t, t, s, condition, self.solver)
            target = consistency_function(roles.target or roles.student, x_s, s, condition)
        distance = METRICS[self.metric](roles.student(x_t, t, condition), target)
        weight = interval_weights(self.weighting, roles.schedule, n).to(distance)[i]
        yield "student", (weight * distance).mean(), {"intervals": float(n)}

    def _told(self, batch: Batch) -> Condition:
        """The condition with a random guidance scale per sample, where the student is told it."""
        if self.guidance_range is None:
            return batch.condition
        low, high = self.guidance_range
        return batch.condition.with_guidance(low + (high - low) * torch.rand(len(batch.noise), device=batch.noise.device))


def consistency_function(network: Denoiser, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """f(x, t): the x0-prediction, and x itself where t = 0 (the boundary condition, exact)."""
    at_data = (t == 0).reshape((-1,) + (1,) * (x.dim() - 1))
    return torch.where(at_data, x, network(x, t.clamp_min(network.schedule.t_min), condition))


def interval_weights(weighting: Weighting, schedule: NoiseSchedule, n: int) -> Tensor:
    """w of the n intervals of the even grid, (n,), with mean 1; in terms of the noise-to-signal ratio r(t) = sigma/alpha:

    ``uniform`` 1; ``inverse_gap`` 1/(r(t) − r(s)) (iCT, sec. 3.4); ``inverse_noise`` r(t)^(−1/2), at most 4. A distance between
    x0-predictions is r times one between the network's own outputs, so that without a weight the loss is all about the
    noisiest intervals, and the errors of the last ones, which every further step adds anew, hardly count.
    """
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    ratio = schedule.sigma(grid) / schedule.alpha(grid).clamp_min(1e-4)
    ratio[0] = 0.0  # the data
    if weighting == "uniform":
        weights = torch.ones(n, dtype=torch.float64)
    elif weighting == "inverse_gap":
        weights = 1 / (ratio[1:] - ratio[:-1])
    else:
        weights = ratio[1:].rsqrt().clamp_max(4.0)
    return weights / weights.mean()


def straight_step(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """x_s on the line of (x0, noise): for the noise of x_t, E[x_s | x_t] is the step that the exact score takes, to second
    order in t − s (Song et al. 2023, theorem 2)."""
    return schedule.add_noise(x0, noise, s)


def solver_step(
    teacher: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, condition: Condition | None, solver: Literal["ddim", "heun"],
) -> Tensor:
    """One step of the teacher's PF-ODE from t to s < t: DDIM (first order; Euler where alpha = 1), or Heun's second-order
    step in the same coordinates (for alpha = 1 EDM's, Karras et al. 2022, alg. 1)."""
    x0 = teacher(x_t, t, condition)
    x_s = teacher.schedule.ddim(x_t, x0, t, s)
    if solver == "ddim":
        return x_s
    # Slopes at both ends in EDM's coordinates (x/alpha, sigma/alpha): dx/dsigma = (x − D)/sigma. At sigma = 0 no slope is
    # defined, and at alpha = 0 (zero terminal SNR) the coordinates are not: the first-order step stands there.
    (alpha_t, sigma_t), (alpha_s, sigma_s) = teacher.schedule.coefficients(x_t, t), teacher.schedule.coefficients(x_t, s)
    x0_s = teacher(x_s, s.clamp_min(teacher.schedule.t_min), condition)
    y_t, y_s, level_t, level_s = x_t / alpha_t, x_s / alpha_s, sigma_t / alpha_t, sigma_s / alpha_s
    slope = 0.5 * ((y_t - x0) / level_t + (y_s - x0_s) / level_s.clamp_min(1e-12))
    second = alpha_s * (y_t + (level_s - level_t) * slope)
    usable = (level_s > 0) & (level_t < 1e4)
    return torch.where(usable, second.to(x_s), x_s)
