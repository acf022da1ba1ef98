"""The space in which a pipeline's scheduler walks, where it is not that of the network.

Most pipelines hand the scheduler's sample to the backbone as it is, or as ``scale_model_input`` leaves it. Some scale it in
their own loop, and turn the answer into what the scheduler wants (Cosmos-Predict2, Sana-Sprint):

    sample = unit · (a x0 + s noise)        on the scheduler's schedule (a, s)
    state  = alpha x0 + sigma noise         on the network's own (alpha, sigma), with the same signal-to-noise ratio at each t

The ``Denoiser`` lives in the network's space, and ``Walk`` translates; ``preconditioned.py`` finds both by probing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Prediction
from distill.recording import Recording, Step
from distill.schedule import EDM, Flow, Kind, NoiseSchedule, double, expand_to


class VarianceExploding(EDM):
    """alpha = 1, sigma on the Karras grid, as schedulers that walk along sigma itself go: their timestep is sigma · scale."""

    def __init__(self, sigma_min: float, sigma_max: float, rho: float = 7.0, scale: float = 1000.0) -> None:
        super().__init__(sigma_min, sigma_max, rho)
        self.scale, self.rho = scale, rho

    def model_time(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.scale

    def from_model_time(self, time: Tensor) -> Tensor:
        return ((double(time) / self.scale) ** (1 / self.rho) - self.low) / (self.high - self.low)


#: What a loop divides the sample by: (a, s) → n, and d n in terms of (a, s, da, ds).
NORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]] = {
    "sum": (lambda a, s: a + s, lambda a, s, da, ds: da + ds),  # alpha + sigma = 1: rectified flow
    "root": (lambda a, s: (a**2 + s**2).sqrt(), lambda a, s, da, ds: (a * da + s * ds) / (a**2 + s**2).sqrt()),  # alpha² + sigma² = 1
    "one": (lambda a, s: torch.ones_like(a), lambda a, s, da, ds: torch.zeros_like(a)),
}
#: What a network is told of the noise level: (alpha, sigma) → time.
CLOCKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "share": lambda a, s: 1000 * s / (a + s),  # the rectified flow's own t, in thousandths
    "angle": lambda a, s: torch.atan2(s, a),  # TrigFlow's
    "log": lambda a, s: (s / a).log() / 4,  # EDM's c_noise
    "sigma": lambda a, s: s / a,
}


class Rescaled(NoiseSchedule):
    """Another schedule's noise levels at each t, with x_t divided by a norm of its coefficients and a clock of its own.

    Args:
        base: the schedule (a, s); here alpha = a / n(a, s), sigma = s / n(a, s).
        norm: n, by its name in ``NORMS``.
        clock: the network's time as a function of alpha and sigma, by its name in ``CLOCKS``.
        data_scale: x0 times this is what the pipeline calls a sample.
    """

    def __init__(self, base: NoiseSchedule, norm: str, clock: str, data_scale: float = 1.0) -> None:
        self.base, self.norm, self.clock = base, norm, clock
        self.t_min, self.train_steps, self.data_scale = base.t_min, base.train_steps, data_scale
        self.initial_scale = float(self.alpha_sigma(torch.ones((), dtype=torch.float64))[1])

    def ratio(self, t: Tensor) -> Tensor:
        """alpha / a = sigma / s, the scale of the state against the base's."""
        return 1 / NORMS[self.norm][0](*self.base.alpha_sigma(t))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.base.alpha_sigma(t)
        n = NORMS[self.norm][0](a, s)
        return a / n, s / n

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        (a, s), (da, ds) = self.base.alpha_sigma(t), self.base.derivatives(t)
        n, dn = NORMS[self.norm][0](a, s), NORMS[self.norm][1](a, s, da, ds)
        return (da * n - a * dn) / n**2, (ds * n - s * dn) / n**2

    def model_time(self, t: Tensor) -> Tensor:
        return CLOCKS[self.clock](*self.alpha_sigma(t))

    def from_model_time(self, time: Tensor) -> Tensor:
        """By bisection: every clock rises with t. (A little beyond t = 1 is allowed: Sana-Sprint starts at 1.5708 > π/2.)"""
        return bisected(self.model_time, time)


def bisected(rising: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """The t in [0, 1.001] at which a rising function has the value."""
    value = double(value)
    low, high = torch.zeros_like(value), torch.full_like(value, 1.001)
    for _ in range(60):
        middle = (low + high) / 2
        below = rising(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Walk:
    """How a pipeline goes between its scheduler's samples and its backbone's states.

    Args:
        schedule, kind: of the scheduler's samples, and what the scheduler is given.
        own: the backbone's schedule; the scheduler's itself in most pipelines.
        unit: a sample is so many times what the schedule says (the data's deviation).
        sign: −1 where the scheduler counts from noise to data, so that velocities point the other way.
        by_sigma: the scheduler's timesteps are rounded, and the network is told of the sigma in its table instead.
        floor: where the pipeline itself turns x0 into the scheduler's kind, it divides by no smaller sigma than this.
    """

    schedule: NoiseSchedule
    kind: Kind
    own: NoiseSchedule
    unit: float = 1.0
    sign: float = 1.0
    by_sigma: bool = False
    floor: float = 0.0

    @classmethod
    def plain(cls, scheduler: Any, schedule: NoiseSchedule, kind: Kind) -> Walk:
        """The scheduler's space is the backbone's."""
        return cls(schedule, kind, schedule, sign=-1.0 if isinstance(schedule, Flow) and scheduler.config.get("invert_sigmas") else 1.0)

    @property
    def trivial(self) -> bool:
        """Whether samples are states."""
        return self.own is self.schedule

    def at(self, timestep: Tensor, sigma: float | None = None) -> Tensor:
        """t at a scheduler's timestep, where its table says sigma (``recording.sigma_at``)."""
        if self.by_sigma and sigma is not None:
            level = torch.full_like(double(timestep), sigma)
            return bisected(self.schedule.sigma if isinstance(self.schedule, Flow) else lambda t: (-self.schedule.log_snr(t) / 2).exp(), level)
        return self.schedule.from_model_time(timestep)

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the scheduler's first sample."""
        return self.unit * (self.schedule.initial_scale if self.trivial else float(self.schedule.sigma(torch.ones((), dtype=torch.float64))))

    def state(self, sample: Tensor, t: Tensor) -> Tensor:
        """The scheduler's sample (batch, ...) as the backbone's state."""
        if self.trivial:
            return sample
        (a, s), (alpha, sigma) = self.schedule.coefficients(sample, t), self.own.coefficients(sample, t)
        return ((alpha + sigma) / (a + s) / self.unit * double(sample)).to(sample.dtype)

    def for_scheduler(self, prediction: Prediction) -> Tensor:
        """What the pipeline gives its scheduler for a prediction made in the backbone's space."""
        value, kind = prediction.value, self.kind
        if not self.trivial:
            x0, eps = (self.own.convert(value, prediction.x_t, prediction.t, prediction.kind, k) for k in ("x0", "eps"))
            value = (self.unit * self._mixed(x0, eps, prediction.t)).to(value.dtype)
        elif prediction.kind != kind:
            converted = prediction.as_kind(kind)
            value = (converted * self._floored(converted, prediction.t)).to(value.dtype)
        return _with_extra(value if self.sign == 1 else self.sign * value, prediction)

    def _mixed(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the scheduler is given, from clean data and noise."""
        (a, s), (da, ds) = self.schedule.coefficients(x0, t), (expand_to(c, x0) for c in self.schedule.derivatives(double(t.to(x0.device))))
        mixed: dict[Kind, Callable[[], Tensor]] = {
            "x0": lambda: x0, "eps": lambda: eps, "v": lambda: a * eps - s * x0, "f": lambda: s * x0 - a * eps, "flow": lambda: eps - x0,
            "velocity": lambda: da * x0 + ds * eps, "score": lambda: -eps / s,
        }
        return mixed[self.kind]()

    def _floored(self, x: Tensor, t: Tensor) -> Tensor | float:
        return (self.schedule.coefficients(x, t)[1] / self.floor).clamp_max(1) if self.floor else 1.0

    # -- recordings -------------------------------------------------------------------------------------------------

    @property
    def recorded_kind(self) -> Kind:
        """The kind of the model outputs in a translated recording."""
        return self.kind if self.trivial else "x0"

    def recorded(self, prediction: Prediction) -> Tensor:
        """A prediction as a translated recording has it."""
        same = prediction.kind == self.recorded_kind
        return _with_extra(prediction.value if same else prediction.as_kind(self.recorded_kind).to(prediction.value.dtype), prediction)

    def translated(self, recording: Recording) -> Recording:
        """The recording as if the scheduler had walked in the backbone's space: its steps hold states, the backbone's clock and
        model outputs of ``recorded_kind``."""
        return replace(recording, steps=[self.translated_step(s) for s in recording.steps])

    def translated_step(self, step: Step, state: Tensor | None = None) -> Step:
        """One step of it.

        Args:
            state: the state as the backbone received it, to the last bit, in the sample's shape.
        """
        output = step.model_output if self.sign == 1 else self.sign * step.model_output
        if self.trivial:
            return step if self.sign == 1 else replace(step, model_output=output)
        t = self.at(step.timestep.reshape(-1)[:1].to(step.sample.device), step.sigma)
        x0 = self.schedule.convert(output, step.scaled, t, self.kind, "x0") / self.unit
        state = self.state(step.scaled, t) if state is None else state
        return replace(step, timestep=self.own.model_time(t)[0], sample=state, scaled=state, model_output=x0)


def _with_extra(value: Tensor, prediction: Prediction) -> Tensor:
    """With the channels beside it, a learnt variance, which some schedulers want."""
    return value if prediction.extra is None else torch.cat([value, prediction.extra], 1)
