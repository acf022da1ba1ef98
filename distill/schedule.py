"""Noise schedules on ``t ∈ [0, 1]`` and the exact algebra between the ways of saying the same prediction.

    x_t = alpha(t) x0 + sigma(t) noise,      t = 0: data,  t = 1: the noisiest point of the schedule
    eps      = the noise                     v        = alpha noise − sigma x0
    velocity = dx_t/dt = alpha' x0 + sigma' noise        score = ∇ log p_t(x_t) = −noise / sigma
    f        = −v, the raw output of EDM's preconditioned networks
    flow     = noise − x0, what flow matching learns, whatever t counts (the velocity, where alpha = 1 − t and sigma = t)

All coefficients and conversions are computed in float64, whatever the network's precision: at the ends of the schedule
a conversion divides by a small alpha or sigma, and float32 would lose there what the network knew.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["x0", "eps", "v", "velocity", "score", "f", "flow"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def expand_to(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append singleton dimensions so that a scalar or (batch,) coefficient multiplies x of shape (batch, ...)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.dim() - coefficient.dim())) if coefficient.dim() else coefficient


def double(x: Tensor) -> Tensor:
    """x in float64, or in float32 on the devices that have no float64 (Apple's MPS)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


class NoiseSchedule(ABC):
    """alpha, sigma and their derivatives as functions of t; subclasses say which.

    Every function takes ``t`` as a scalar or a tensor of shape (batch,) and answers in float64 of the same shape.
    """

    #: the smallest t at which a network of this schedule was trained
    t_min: float = 1e-3
    #: number of steps of the teacher's own discretisation
    train_steps: int = 1000
    #: standard deviation of the noise that sampling starts from
    initial_scale: float = 1.0
    #: x0 times this is what the pipeline itself calls a sample
    data_scale: float = 1.0

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha(t), sigma(t))."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha/dt, d sigma/dt)."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What the backbone wants to see at t."""

    @abstractmethod
    def from_model_time(self, time: Tensor) -> Tensor:
        """The inverse of ``model_time`` (for t ≥ t_min)."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[1]

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha² / sigma²)."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def coefficients(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) in float64, shaped to multiply x."""
        alpha, sigma = self.alpha_sigma(double(t.to(x.device)))
        return expand_to(alpha, x), expand_to(sigma, x)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise, in x0's dtype."""
        alpha, sigma = self.coefficients(x0, t)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def renoise(self, x_s: Tensor, noise: Tensor, s: Tensor | None, t: Tensor) -> Tensor:
        """A sample of x_t given x_s, s ≤ t: a x_s + b noise with a = alpha_t/alpha_s and b² = sigma_t² − a² sigma_s².

        Args:
            s: (batch,) the level that x_s is at; None: clean.
        """
        if s is None:
            return self.add_noise(x_s, noise, t)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.coefficients(x_s, s), self.coefficients(x_s, t)
        a = alpha_t / alpha_s
        return (a * x_s + (sigma_t**2 - (a * sigma_s) ** 2).clamp_min(0).sqrt() * noise).to(x_s.dtype)

    def ddim(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """One deterministic step from t to s ≤ t along the given x0-prediction (Song et al. 2020, eq. 12 with eta = 0).

        Written without 1/alpha_t, so that it is exact where alpha_t = 0; exact for any schedule when x0 is constant in t.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.coefficients(x_t, t), self.coefficients(x_t, s)
        ratio = sigma_s / sigma_t
        return (ratio * x_t + (alpha_s - alpha_t * ratio) * x0).to(x_t.dtype)

    def convert(self, value: Tensor, x_t: Tensor, t: Tensor, source: Kind, target: Kind) -> Tensor:
        """Express a prediction of one kind, made at (x_t, t), as another kind. Answers in float64.

        Singular only where the information is not there: x0 from eps or score where alpha = 0 (zero terminal SNR),
        eps or score from x0 where sigma = 0.
        """
        if source == target:
            return double(value)
        if source == "f":
            return self.convert(-value, x_t, t, "v", target)
        if target == "f":
            return -self.convert(value, x_t, t, source, "v")
        t = double(t.to(x_t.device))
        alpha, sigma = (expand_to(c, x_t) for c in self.alpha_sigma(t))
        value, x_t = double(value), double(x_t)
        x0, eps = self._decompose(value, x_t, t, alpha, sigma, source)
        if target == "x0":
            return x0()
        if target == "eps":
            return eps()
        if target == "score":
            return -eps() / sigma
        if target == "v":
            return alpha * eps() - sigma * x0()
        if target == "flow":
            return eps() - x0()
        d_alpha, d_sigma = (expand_to(c, x_t) for c in self.derivatives(t))
        return d_alpha * x0() + d_sigma * eps()

    def _decompose(self, value: Tensor, x_t: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, source: Kind) -> Any:
        """Functions that give x0 and eps; lazy, since one of the two may be singular and not needed."""
        if source == "x0":
            return (lambda: value), (lambda: (x_t - alpha * value) / sigma)
        if source == "eps":
            return (lambda: (x_t - sigma * value) / alpha), (lambda: value)
        if source == "score":
            return (lambda: (x_t + sigma**2 * value) / alpha), (lambda: -sigma * value)
        if source == "v":  # the rows (alpha, sigma), (−sigma, alpha) are orthogonal: invert by the transpose
            norm = alpha**2 + sigma**2
            return (lambda: (alpha * x_t - sigma * value) / norm), (lambda: (sigma * x_t + alpha * value) / norm)
        if source == "flow":
            return (lambda: (x_t - sigma * value) / (alpha + sigma)), (lambda: (x_t + alpha * value) / (alpha + sigma))
        if source == "velocity":
            d_alpha, d_sigma = (expand_to(c, x_t) for c in self.derivatives(t))
            det = alpha * d_sigma - sigma * d_alpha
            return (lambda: (d_sigma * x_t - sigma * value) / det), (lambda: (alpha * value - d_alpha * x_t) / det)
        raise ValueError(f"unknown prediction kind {source!r}; known: {', '.join(KINDS)}")


class TabulatedVP(NoiseSchedule):
    """A variance-preserving schedule given at N discrete steps, made continuous.

    Step k of the table sits at t = (k + 1)/N, so that t = 1 is the last one and t = 0 is clean data. Between the nodes
    the *angle* phi = atan2(sigma, alpha) is interpolated linearly, which keeps alpha² + sigma² = 1 and, unlike log-SNR,
    stays finite at a zero terminal SNR.

    Args:
        alphas_cumprod: (N,) the products of a diffusers scheduler, alpha² at each step.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alpha_squared = alphas_cumprod.detach().cpu().double().clamp(0, 1)
        angles = torch.atan2((1 - alpha_squared).sqrt(), alpha_squared.sqrt())
        self.angles = torch.cat([angles.new_zeros(1), angles])
        self.train_steps = len(alphas_cumprod)
        self.t_min = 1 / self.train_steps

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.angles.device != t.device:
            self.angles = self.angles.to(t.device)
        position = double(t) * self.train_steps
        index = position.ceil().long().clamp(1, self.train_steps) - 1
        left, right = self.angles[index], self.angles[index + 1]
        return left + (position - index) * (right - left), (right - left) * self.train_steps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        phi, _ = self._angle(t)
        return phi.cos(), phi.sin()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        phi, slope = self._angle(t)
        return -phi.sin() * slope, phi.cos() * slope

    def model_time(self, t: Tensor) -> Tensor:
        return (double(t) * self.train_steps - 1).clamp_min(0)

    def from_model_time(self, time: Tensor) -> Tensor:
        return (double(time) + 1) / self.train_steps


class Flow(NoiseSchedule):
    """Flow matching / rectified flow: alpha = 1 − t, sigma = t. The backbone sees t · scale.

    Args:
        inverted: it sees (1 − t) · scale: time runs from noise to data (Mochi, OmniGen).
    """

    def __init__(self, scale: float = 1000.0, inverted: bool = False) -> None:
        self.scale, self.inverted = scale, inverted

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = double(t)
        return 1 - t, t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(double(t))
        return -one, one

    def model_time(self, t: Tensor) -> Tensor:
        return (1 - double(t) if self.inverted else double(t)) * self.scale

    def from_model_time(self, time: Tensor) -> Tensor:
        share = double(time) / self.scale
        return 1 - share if self.inverted else share


class EDM(NoiseSchedule):
    """Variance exploding on the Karras grid: alpha = 1, sigma(t)^(1/rho) linear in t (Karras et al. 2022, eq. 5).

    The backbone sees ln(sigma)/4 (their c_noise).
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.low, self.high, self.rho = sigma_min ** (1 / rho), sigma_max ** (1 / rho), rho
        self.t_min, self.initial_scale = 0.0, sigma_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        root = self.low + double(t) * (self.high - self.low)
        return torch.ones_like(root), root**self.rho

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        root = self.low + double(t) * (self.high - self.low)
        return torch.zeros_like(root), self.rho * root ** (self.rho - 1) * (self.high - self.low)

    def model_time(self, t: Tensor) -> Tensor:
        return self.sigma(t).log() / 4

    def from_model_time(self, time: Tensor) -> Tensor:
        return ((4 * double(time)).exp() ** (1 / self.rho) - self.low) / (self.high - self.low)


class PreconditionedEDM(EDM):
    """EDM as its networks see it: x_t = c_in (x0 + sigma noise), with x0 in units of the data's deviation sigma_data.

    c_in = 1/√(sigma² + sigma_data²) makes this variance preserving, with alpha = sigma_data c_in and the noise's factor
    sigma c_in, and the network's raw output F is −v: D/sigma_data = c_skip … + c_out F (Karras et al. 2022, eq. 7 and table 1)
    = alpha x_t + sigma F.

    Args:
        time_scale: the backbone sees this times ln(sigma).
    """

    def __init__(self, sigma_min: float, sigma_max: float, rho: float, sigma_data: float, time_scale: float = 0.25) -> None:
        super().__init__(sigma_min, sigma_max, rho)
        self.initial_scale, self.data_scale, self.time_scale = 1.0, sigma_data, time_scale

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ratio = super().alpha_sigma(t)[1] / self.data_scale
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ratio, slope = super().alpha_sigma(t)[1] / self.data_scale, super().derivatives(t)[1] / self.data_scale
        alpha = (1 + ratio**2).rsqrt()
        return -ratio * slope * alpha**3, slope * alpha**3

    def model_time(self, t: Tensor) -> Tensor:
        return super().alpha_sigma(t)[1].log() * self.time_scale

    def from_model_time(self, time: Tensor) -> Tensor:
        return super().from_model_time(double(time) / self.time_scale / 4)


class CosineVP(NoiseSchedule):
    """The variance-preserving schedule alpha = cos(πt/2), sigma = sin(πt/2) (TrigFlow's circle, zero terminal SNR).

    Args:
        scale: the backbone sees t · scale: π/2 for the angle itself.
    """

    def __init__(self, scale: float = 1.0, data_scale: float = 1.0) -> None:
        self.scale, self.data_scale = scale, data_scale

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        phi = double(t) * (math.pi / 2)
        return phi.cos(), phi.sin()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        phi = double(t) * (math.pi / 2)
        return -phi.sin() * (math.pi / 2), phi.cos() * (math.pi / 2)

    def model_time(self, t: Tensor) -> Tensor:
        return double(t) * self.scale

    def from_model_time(self, time: Tensor) -> Tensor:
        return double(time) / self.scale


class OffsetCosineVP(NoiseSchedule):
    """Nichol & Dhariwal's (2021, eq. 17) cosine schedule in continuous time: alpha = cos(π/2 (t + s)/(1 + s)) / cos(π/2 s/(1 + s)),
    kept at least 0.01, as Würstchen's scheduler keeps it."""

    least = 0.01

    def __init__(self, offset: float = 0.008) -> None:
        self.offset = offset

    def _angle(self, t: Tensor) -> Tensor:
        return (double(t) + self.offset) / (1 + self.offset) * (math.pi / 2)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = (self._angle(t).cos() / self._angle(torch.zeros_like(t)).cos()).clamp(self.least, math.sqrt(1 - self.least**2))
        return alpha, (1 - alpha**2).sqrt()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        slope = -self._angle(t).sin() / self._angle(torch.zeros_like(t)).cos() * (math.pi / 2) / (1 + self.offset)
        return slope, -alpha * slope / sigma

    def model_time(self, t: Tensor) -> Tensor:
        return double(t)

    def from_model_time(self, time: Tensor) -> Tensor:
        return double(time)


_KIND_OF_PREDICTION_TYPE: dict[str, Kind] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "velocity",
}


def from_scheduler(scheduler: Any) -> tuple[NoiseSchedule, Kind]:
    """The schedule of a diffusers scheduler and the kind of prediction that its backbone makes.

    Raises:
        ValueError: for a scheduler whose schedule is not known here.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"):
        if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {config.prediction_type!r} of {name} is not supported")
        kind: Kind = "v" if config.get("prediction_type") == "v_prediction" else "f"
        time_scale = 250.0 if name.startswith("CM") else 0.25
        return PreconditionedEDM(config.sigma_min, config.sigma_max, config.get("rho", 7.0), config.sigma_data, time_scale), kind
    if name == "DDPMWuerstchenScheduler":
        return OffsetCosineVP(float(config.s)), "eps"
    if name == "IPNDMScheduler":
        return CosineVP(), "v"
    if name == "SCMScheduler":
        return CosineVP(math.pi / 2, float(config.sigma_data)), "v"
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return Flow(float(config.num_train_timesteps), bool(config.get("invert_sigmas"))), "velocity"
    if hasattr(scheduler, "alphas_cumprod") and scheduler.alphas_cumprod is not None:
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in _KIND_OF_PREDICTION_TYPE:
            raise ValueError(f"prediction_type {prediction_type!r} of {name} is not supported")
        return TabulatedVP(scheduler.alphas_cumprod), _KIND_OF_PREDICTION_TYPE[prediction_type]
    raise ValueError(f"the noise schedule of {name} is not known: it has no alphas_cumprod and is no flow-matching scheduler")
