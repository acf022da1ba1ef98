"""Teachers whose answers are known exactly: Gaussians and Gaussian mixtures under any schedule. The ground truth.

For x0 ~ sum_k w_k N(mu_k, diag s_k²) the noised law is p_t = sum_k w_k N(alpha mu_k, alpha² s_k² + sigma²), and

    D(x, t) = sum_k r_k(x) [ mu_k + alpha s_k² / (alpha² s_k² + sigma²) (x − alpha mu_k) ],   r_k: responsibilities.

Each is a ``Denoiser``, so every method runs on it unchanged. The small students and critics here are what ``distill verify``
and the tests train against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Condition, Denoiser, Prediction
from distill.schedule import Kind, NoiseSchedule, double, expand_to


class GaussianMixture(Denoiser):
    """The exact denoiser of a mixture of K Gaussians with diagonal covariances in d dimensions.

    A condition's ``class_labels`` (batch,) choose a component each; the label K means the whole mixture (null condition).
    Requested ``features``, whatever their names, are (x_t, t): (batch, d + 1).

    Args:
        means: (K, d).
        stds: (K, d) or (K, 1).
        weights: (K,), equal if not given.
    """

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule, means: Tensor, stds: Tensor, weights: Tensor | None = None) -> None:
        self.schedule = schedule
        self.means, self.stds = means.double(), stds.double().expand_as(means)
        weights = torch.ones(len(means)) if weights is None else weights
        self.log_weights = (weights / weights.sum()).double().log()

    def _parts(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor, Tensor]:
        """(log w_k N(x_t; alpha mu_k, variance), (batch, K); posterior means and variances of x_t, (batch, K, d))."""
        alpha, sigma = (expand_to(c.expand(len(x_t)), torch.empty(1, 1, 1)) for c in self.schedule.alpha_sigma(double(t)))
        variance = (alpha * self.stds) ** 2 + sigma**2
        residual = double(x_t)[:, None] - alpha * self.means
        log_density = -0.5 * (residual**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        log_joint = log_density + self._log_prior(len(x_t), condition)
        means = self.means + alpha * self.stds**2 / variance * residual
        return log_joint, means, variance

    def _log_prior(self, batch: int, condition: Condition | None) -> Tensor:
        prior = self.log_weights.expand(batch, -1)
        if condition is None or "class_labels" not in condition.values:
            return prior
        labels = condition.values["class_labels"]
        assert isinstance(labels, Tensor)
        chosen = torch.arange(len(self.means))[None] == labels[:, None]
        certain = torch.zeros_like(prior).masked_fill(~chosen, -math.inf)
        return torch.where((labels == len(self.means))[:, None], prior, certain)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t = double(t).expand(len(x_t))
        log_joint, means, _ = self._parts(x_t, t, condition)
        x0 = (log_joint.softmax(1)[..., None] * means).sum(1)
        state = torch.cat([x_t, t[:, None].to(x_t)], 1)
        return Prediction(x0, "x0", x_t, t, self.schedule, {name: state for name in features})

    def log_density(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """log p_t(x_t), (batch,), float64."""
        return self._parts(x_t, double(t).expand(len(x_t)), condition)[0].logsumexp(1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, d) samples of x0, float32."""
        chosen = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[chosen] + self.stds[chosen] * noise).float()

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The probability-flow ODE's exact map from t to r, for one Gaussian:

            X_{t→r}(x) = alpha_r mu + sqrt(V_r / V_t) (x − alpha_t mu),   V = alpha² s² + sigma².

        Raises:
            ValueError: for a mixture, whose map has no closed form.
        """
        if len(self.means) != 1:
            raise ValueError("only a single Gaussian's flow map is known in closed form")
        mean, std = self.means[0], self.stds[0]
        (alpha_t, sigma_t), (alpha_r, sigma_r) = self.schedule.coefficients(x_t, t), self.schedule.coefficients(x_t, r)
        ratio = (((alpha_r * std) ** 2 + sigma_r**2) / ((alpha_t * std) ** 2 + sigma_t**2)).sqrt()
        return alpha_r * mean + ratio * (double(x_t) - alpha_t * mean)


def gaussian(schedule: NoiseSchedule, mean: Sequence[float], std: Sequence[float]) -> GaussianMixture:
    """One Gaussian with the given mean and standard deviation per dimension."""
    return GaussianMixture(schedule, torch.tensor([list(mean)]), torch.tensor([list(std)]))


def ring(schedule: NoiseSchedule, modes: int = 8, radius: float = 2.0, std: float = 0.2) -> GaussianMixture:
    """Equal Gaussians on a circle in two dimensions."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return GaussianMixture(schedule, radius * torch.stack([angle.cos(), angle.sin()], 1), torch.full((modes, 1), std))


# -- students and critics -----------------------------------------------------------------------------------------------


class AffineGenerator(Denoiser):
    """x = m + s z per dimension, at whatever t: the student whose law is a Gaussian that is known exactly."""

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule, mean: Sequence[float], std: Sequence[float]) -> None:
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(list(mean), dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(list(std), dtype=torch.float64))

    def parameters(self) -> list[nn.Parameter]:
        return [self.mean, self.std]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        z = x_t.double() / self.schedule.initial_scale
        return Prediction((self.mean + self.std * z).to(x_t.dtype), "x0", x_t, t.expand(len(x_t)), self.schedule)

    def law(self) -> GaussianMixture:
        """The exact denoiser of what it generates, now; differentiable in its parameters."""
        return GaussianMixture(self.schedule, self.mean[None], self.std.abs()[None])


class ExactMap(Denoiser):
    """The consistency function that has converged: a Gaussian's exact flow map from t to data."""

    kind: Kind = "x0"

    def __init__(self, teacher: GaussianMixture) -> None:
        self.teacher, self.schedule = teacher, teacher.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t = double(t).expand(len(x_t))
        return Prediction(self.teacher.flow_map(x_t, t, torch.zeros_like(t)), "x0", x_t, t, self.schedule)


class ExactFlowMap(Denoiser):
    """The flow map that has converged: told an end, a Gaussian's exact average velocity on the way there; else its denoiser.

    Args:
        other: another Gaussian, whose map it is instead (a wrong one).
    """

    kind: Kind = "flow"

    def __init__(self, teacher: GaussianMixture, other: GaussianMixture | None = None) -> None:
        self.teacher, self.law, self.schedule = teacher, other or teacher, teacher.schedule
        #: something to train, zero in the exact map: a shift of the velocity, and a tilt of it
        self.change = nn.Parameter(torch.zeros(2, self.law.means.shape[1], dtype=torch.float64))

    def parameters(self) -> list[nn.Parameter]:
        return [self.change]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t = double(t).expand(len(x_t))
        s = t if condition is None or condition.end is None else condition.end
        mean, std, x = self.law.means[0], self.law.stds[0], double(x_t)
        (a, b), (a_s, b_s) = self.schedule.coefficients(x, t), self.schedule.coefficients(x, s)
        deviation, deviation_s = (((k * std) ** 2 + m**2).sqrt() for k, m in ((a, b), (a_s, b_s)))
        c, c_s = a + b, a_s + b_s
        # z_s − z_t = (a_s/c_s − a/c) mean + (deviation_s/c_s − deviation/c) (x − a mean)/deviation, over tau_s − tau_t = (1 − a_s/c_s) − (1 − a/c);
        # with r = deviation/c, r² = (1 − tau)² std² + tau², the difference of r over that of tau is taken without the quotient 0/0.
        r, r_s, tau, tau_s = deviation / c, deviation_s / c_s, b / c, b_s / c_s
        slope = ((tau + tau_s) - (2 - tau - tau_s) * std**2) / (r + r_s)
        unit = (x - a * mean) / deviation
        velocity = -mean + slope * unit + self.change[0] + self.change[1] * unit
        return Prediction(velocity, "flow", x_t, t, self.schedule)


class ExactCritic(Denoiser):
    """The critic that has converged: at every call the exact denoiser of an affine generator's samples."""

    kind: Kind = "x0"

    def __init__(self, generator: AffineGenerator) -> None:
        self.generator, self.schedule = generator, generator.schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        law = GaussianMixture(self.schedule, self.generator.mean.detach()[None], self.generator.std.detach().abs()[None])
        return law.predict(x_t, t, None, features)  # a function of x_t alone: some objectives differentiate it there


class ExactRatio(nn.Module):
    """The discriminator that has converged: logit = log p_t(x_t) − log q_t(x_t), from the features (x_t, t).

    Args:
        upside_down: the negative, log q_t/p_t (an ablation).
    """

    def __init__(self, teacher: GaussianMixture, generator: AffineGenerator, upside_down: bool = False) -> None:
        super().__init__()
        self.teacher, self.generator, self.sign = teacher, generator, -1 if upside_down else 1

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        state = next(iter(features.values()))
        x_t, t = state[:, :-1], state[:, -1]
        return self.sign * (self.teacher.log_density(x_t, t) - self.generator.law().log_density(x_t, t))


class MLPDenoiser(Denoiser, nn.Module):  # type: ignore[misc]
    """A small network D(x_t, t) for d-dimensional toy data, preconditioned as EDM's (Karras et al. 2022, table 1):

        D = c_skip x + c_out F(c_in x, log-SNR)     with alpha folded in, so that any schedule will do.

    Args:
        width: of its three hidden layers.
        skip: False leaves out the term c_skip x: a network whose output at t = 0 is nothing in particular.
    """

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule, dim: int, width: int = 128, data_std: float = 1.0, skip: bool = True) -> None:
        nn.Module.__init__(self)
        self.schedule, self.data_std, self.skip = schedule, data_std, skip
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Linear(dim + 8 if i == 0 else width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, dim))

    def parameters(self, recurse: bool = True) -> Any:
        return nn.Module.parameters(self, recurse)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.predict(x_t, t, condition).x0

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """c_in x beside an embedding of the noise level, (batch, dim + 8)."""
        alpha, sigma = (c.float() for c in self.schedule.coefficients(x_t, t))
        level = torch.atan2(sigma, alpha)
        embedding = torch.cat([f(level * k) for k in (1.0, 2.0, 4.0, 8.0) for f in (torch.sin, torch.cos)], 1)
        return torch.cat([x_t / ((alpha * self.data_std) ** 2 + sigma**2).sqrt(), embedding], 1)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t = t.expand(len(x_t))
        alpha, sigma = (c.float() for c in self.schedule.coefficients(x_t, t))
        variance = (alpha * self.data_std) ** 2 + sigma**2
        x0 = self.net(self.inputs(x_t, t, condition))
        if self.skip:
            x0 = alpha * self.data_std**2 / variance * x_t + self.data_std * sigma / variance.sqrt() * x0
        state = torch.cat([x_t, t[:, None].to(x_t)], 1)
        return Prediction(x0, "x0", x_t, t, self.schedule, {name: state for name in features})


class TwoTimeMLP(MLPDenoiser):
    """The same, told the end of a jump, too: by embeddings of both times."""

    def __init__(self, schedule: NoiseSchedule, dim: int, width: int = 128, data_std: float = 1.0) -> None:
        super().__init__(schedule, dim, width, data_std)
        first = self.net[0]
        assert isinstance(first, nn.Linear)
        self.net[0] = nn.Linear(first.in_features + 8, width)

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        end = t if condition is None or condition.end is None else condition.end.expand(len(x_t))
        alpha, sigma = (c.float() for c in self.schedule.coefficients(x_t, end))
        level = torch.atan2(sigma, alpha)
        return torch.cat([super().inputs(x_t, t, condition), *(f(level * k) for k in (1.0, 2.0, 4.0, 8.0) for f in (torch.sin, torch.cos))], 1)
