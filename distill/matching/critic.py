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
    """Critic updates by need: more while the critic lags behind the student, fewer while it does not.

    The lag is the part of the student's gradient that the critic gets wrong. At the posterior mean D* of the student's samples,
    E⟨x − D_F(x_t), g⟩ = E⟨D* − D_F, g⟩ for any g(x_t); with g the score gap D_F − D_T itself,

        lag = |E⟨x − D_F, D_F − D_T⟩| / E‖D_F − D_T‖²

    is 1 where the critic has come half the way from the teacher to the student, and 0 where it is right. All of it is there in
    the student's own step: measuring it costs nothing. Running means are taken of both; the numerator's own variance, which
    would look like a lag as the gap closes, is subtracted from its square.

    The number of updates n is moved by (lag / wanted)^gain a step. In the linear model of two time scales (student rate a, critic
    rate b an update) the lag settles at a root of its own: critical damping, b n = 4 a, is a lag of ½, and a lag of ¼ is b n = 16 a / 3.
    A fractional n is kept to on average. Not weighted as the loss is: the weights stress low noise, where what is left is the
    critic's own error, which more updates do not remove.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    lag: Annotated[float, Field(gt=0)] = 0.5  #: wanted
    at_most: Annotated[int, Field(ge=1)] = 10
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5  #: decay of the running means; a long one answers too late, and overshoots
    gain: Annotated[float, Field(gt=0, le=1)] = 0.03  #: how fast the number of updates follows the lag

    def initial_state(self) -> Tensor:
        """[number of updates, what earlier ones left over, running mean of the numerator, of the denominator, of the numerator's
        variance]. It starts at the most: the critic begins as the teacher, and has all the way to go."""
        return torch.tensor([float(self.at_most), 0.0, 0.0, 0.0, 0.0])

    def updates(self, state: Tensor) -> int:
        """How many the critic gets now: the whole part of the number, its fraction being carried over."""
        return max(1, int(state[0] + state[1]))

    def follow(self, state: Tensor, x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """Update the state in place from one student step; the lag, a scalar.

        Args:
            x: (batch, ...) the student's samples; real, fake: what teacher and critic make of them, noised.
        """
        state[1] = (state[0] + state[1]) % 1.0
        gap = fake - real
        each = ((x - fake) * gap).flatten(1).mean(1)
        now = torch.stack([each.mean(), gap.square().mean(), each.var() / len(each)]).to(state)
        means = state[2:]
        means.copy_(torch.where(means.any(), torch.lerp(now, means, self.memory), now))
        noise = means[2] * (1 - self.memory) / (1 + self.memory)  # variance of a running mean
        lag = (means[0].square() - noise).clamp_min(0).sqrt() / means[1].clamp_min(1e-20)
        state[0] = (state[0] * (lag / self.lag).clamp(0.25, 4) ** self.gain).clamp(1, self.at_most)
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
