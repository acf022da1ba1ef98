"""The critic: what it learns of the student's samples, and how many updates it gets for one of the student's."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.guidance import Guided

CriticTarget = Literal["exact", "tdm_published"]

SUBINTERVAL_CAP = 10.0  #: the weight of a subinterval target is min(1, this × b²): its variance is 1/b²


class Adaptive(BaseModel):
    """Critic updates by need: one more a step while the critic lags behind the student, one fewer while it does not.

    The lag is the part of the student's gradient that the critic gets wrong. At the posterior mean D* of the student's samples,
    E⟨x − D_F(x_t), g⟩ = E⟨D* − D_F, g⟩ for any g(x_t); with g the score gap D_F − D_T itself,

        lag = |E⟨x − D_F, D_F − D_T⟩| / E‖D_F − D_T‖²

    is 1 where the critic has come half the way from the teacher to the student, and 0 where it is right. All of it is there in
    the student's own step: measuring it costs nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    lag: Annotated[float, Field(gt=0)] = 0.25  #: more updates above this, fewer below
    at_most: Annotated[int, Field(ge=1)] = 10
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.9  #: decay of the running means

    def initial_state(self) -> Tensor:
        """[number of updates, running mean of the numerator, of the denominator]."""
        return torch.tensor([1.0, 0.0, 0.0])

    def follow(self, state: Tensor, x: Tensor, real: Tensor, fake: Tensor) -> float:
        """Update the state in place from one student step; the lag."""
        gap = fake - real
        now = torch.stack([((x - fake) * gap).mean(), gap.square().mean()]).to(state)
        first = bool((state[1:] == 0).all())
        state[1:] = now if first else self.memory * state[1:] + (1 - self.memory) * now
        lag = float(state[1].abs() / state[2].clamp_min(1e-20)) if float(state[2]) > 0 else float("inf")
        state[0] = (state[0] + (1 if lag > self.lag else -1)).clamp(1, self.at_most)
        return lag


def denoising_loss(
    network: Denoiser, x0: Tensor, t: Tensor, condition: Condition | None, s: Tensor | None = None, guidance_scale: float = 1.0
) -> Tensor:
    """Denoising score matching in the network's own parameterisation, mean over elements.

    With ``s`` the samples lie at noise level s and no clean ones exist: x_t = a x_s + b noise, and the regression target whose
    conditional mean is the denoiser of their law at t > s is (Phased DMD: Fan et al. 2025; guide, 0.7)

        x_s/alpha_s − alpha_t sigma_s²/(alpha_s² b) noise.

    Its variance grows as 1/b²: the squared error is weighted by min(1, 10 b²).

    Args:
        guidance_scale: of the network in its own loss (SiD-LSG's "long" guidance); 1 is off.
    """
    schedule, noise = network.schedule, torch.randn_like(x0)
    weight: Tensor | float = 1.0
    if s is None:
        x_t, target = schedule.add_noise(x0, noise, t), x0
    else:
        (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.coefficients(x0, s), schedule.coefficients(x0, t)
        a = alpha_t / alpha_s
        variance = (sigma_t**2 - (a * sigma_s) ** 2).clamp_min(1e-8)
        x_t = (a * x0 + variance.sqrt() * noise).to(x0.dtype)
        target = x0 / alpha_s - alpha_t * sigma_s**2 / (alpha_s**2 * variance.sqrt()) * noise
        weight = (SUBINTERVAL_CAP * variance).clamp_max(1).to(x0.dtype)
    wanted = schedule.convert(target, x_t, t, "x0", network.kind).to(x0.dtype)
    value = Guided(network, guidance_scale).predict(x_t, t, condition).value
    return (weight * (value.to(x0.dtype) - wanted).square()).mean()


def published_tdm_loss(network: Denoiser, x_s: Tensor, x0: Tensor, s: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """TDM's critic as its code has it (Luo et al. 2025): x0 is regressed at x_t = a x_s + b noise, weighted by min(SNR, 5) and by
    the ratio of likelihoods of the effective and the fresh noise. Not the denoiser of x_s's law: kept to compare with."""
    schedule, noise = network.schedule, torch.randn_like(x_s)
    x_t = schedule.renoise(x_s, noise, s, t)
    alpha, sigma = schedule.coefficients(x_s, t)
    effective = ((x_t - alpha * x0) / sigma).flatten(1).square().mean(1)
    importance = torch.exp(0.5 * (noise.flatten(1).square().mean(1) - effective))
    snr = (alpha / sigma).square().clamp_max(5)
    weight = (snr * importance.reshape(alpha.shape)).to(x_s.dtype)
    return (weight * (network(x_t, t, condition) - x0).square()).mean()
