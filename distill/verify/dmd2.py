"""DMD2 and f-distill against closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.analytic import AffineGenerator, ExactCritic, ExactRatio, GaussianMixture, MLPDenoiser, gaussian, ring
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.losses.divergence import DIVERGENCES, GENERATORS, Divergence
from distill.methods.base import Batch
from distill.methods.dmd2 import DMD2, GAN
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.core import Check, at_most, between, relative_error, train

# The gradient checks' noise levels, student (mean, standard deviation) and teacher: chosen so that p/q and q/p both have
# light tails under the student, without which the estimator of one divergence or another has no useful variance.
TIMES = (0.5, 0.9)
STUDENT = ((-0.9,), (0.8,))


def checks(divergences: Sequence[str] | None = None) -> Iterator[Check]:
    """All checks of the method, or those of some divergences alone."""
    wanted = [d for d in DIVERGENCES if divergences is None or d in divergences]
    for divergence in wanted:
        yield from gradient_checks(divergence)
    if divergences is None:
        for schedule in (EDM(sigma_max=10.0), Flow()):
            yield at_most("dmd2", f"reverse_kl gradient, {type(schedule).__name__} schedule, n = 1e5", gradient_error("reverse_kl", 100_000, schedule), 1e-2)
    yield from optimum_checks(wanted)
    if divergences is None:
        yield from two_time_scale_checks()
        yield from mixture_checks()


# -- gradients ----------------------------------------------------------------------------------------------------------


def close_modes(schedule: NoiseSchedule) -> GaussianMixture:
    """0.4 N(−0.7, 0.49) + 0.6 N(0.7, 0.49): the teacher of the gradient checks."""
    return GaussianMixture(schedule, torch.tensor([[-0.7], [0.7]]), torch.tensor([[0.7], [0.7]]), torch.tensor([0.4, 0.6]))


def two_modes(schedule: NoiseSchedule) -> GaussianMixture:
    """The guide's teacher 0.4 N(−2, 0.25) + 0.6 N(2, 0.25)."""
    return GaussianMixture(schedule, torch.tensor([[-2.0], [2.0]]), torch.tensor([[0.5], [0.5]]), torch.tensor([0.4, 0.6]))


def divergence_value(divergence: Divergence, teacher: GaussianMixture, student: GaussianMixture, times: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights_i D_f(p_t ‖ q_t) at times_i in one dimension, by quadrature over x; differentiable in the student."""
    total = torch.zeros((), dtype=torch.float64)
    for t, w in zip(times, weights, strict=True):
        scale = float(teacher.schedule.alpha(t) * 4 + teacher.schedule.sigma(t))
        x = torch.linspace(-9 * scale, 9 * scale, 6001, dtype=torch.float64)[:, None]
        log_p, log_q = teacher.log_density(x, t), student.log_density(x, t)
        r = (log_p - log_q).clamp(-60, 60).exp()
        total = total + w * torch.trapezoid(log_q.exp() * GENERATORS[divergence](r), x[:, 0])
    return total


def true_gradient(divergence: Divergence, schedule: NoiseSchedule) -> Tensor:
    """Gradient in (mean, std) of the divergence averaged over t ~ U[TIMES]: Gauss–Legendre in t, quadrature in x, autograd."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    low, high = TIMES
    times = torch.from_numpy((nodes + 1) / 2 * (high - low) + low)
    generator = AffineGenerator(schedule, *STUDENT)
    divergence_value(divergence, close_modes(schedule), generator.law(), times, torch.from_numpy(weights / 2)).backward()
    assert generator.mean.grad is not None and generator.std.grad is not None
    return torch.cat([generator.mean.grad, generator.std.grad])


def estimated_gradient(divergence: Divergence, count: int, schedule: NoiseSchedule, stale: bool = False) -> Tensor:
    """The gradient that ``DMD2.step`` yields for its student, with an exact critic and an exact density ratio.

    Args:
        stale: the ablation of the critic: one that stands for another student.
    """
    method = DMD2(
        divergence=divergence, weighting="kl", score_times=TIMES, ratio_normalization="none", critic_steps=1,
        gan=None if divergence == "reverse_kl" else GAN(weight=1e-30, features="teacher", layers=["state"]),
    )
    generator = AffineGenerator(schedule, *STUDENT)
    teacher = close_modes(schedule)
    critic = ExactCritic(AffineGenerator(schedule, (1.0,), (0.5,)) if stale else generator)
    roles = Roles(teacher, generator, critic, discriminator=ExactRatio(teacher, generator))  # type: ignore[arg-type]
    batch = Batch(torch.randn(count, 1, dtype=torch.float64), Condition(), teacher.sample(count).double())
    role, loss, _ = next(iter(method.step(roles, batch)))
    assert role == "student"
    loss.backward(inputs=generator.parameters())
    assert generator.mean.grad is not None and generator.std.grad is not None
    return torch.cat([generator.mean.grad, generator.std.grad])


def gradient_error(divergence: Divergence, count: int, schedule: NoiseSchedule, against: Divergence | None = None, stale: bool = False) -> float:
    torch.manual_seed(0)
    return relative_error(estimated_gradient(divergence, count, schedule, stale), true_gradient(against or divergence, schedule))


def gradient_checks(divergence: Divergence) -> Iterator[Check]:
    schedule = CosineVP()
    truth = true_gradient(divergence, schedule)
    torch.manual_seed(0)
    counts, repeats = (1_000, 10_000, 100_000), (64, 32, 24)
    errors = [[relative_error(estimated_gradient(divergence, n, schedule), truth) for _ in range(r)] for n, r in zip(counts, repeats, strict=True)]
    rms = [math.sqrt(sum(e**2 for e in row) / len(row)) for row in errors]
    yield at_most("dmd2", f"{divergence} gradient against autograd, n = 1e5", rms[-1], 1e-2)
    slope = float(np.polyfit(np.log(counts), np.log(rms), 1)[0])
    yield between("dmd2", f"{divergence} gradient error's slope in n (1/√n)", slope, -0.65, -0.35)
    if divergence == "reverse_kl":
        error = gradient_error(divergence, 100_000, schedule, stale=True)
        yield at_most("dmd2", "ablation: a critic that does not follow the student", error, 1e-2, must_fail=True)
    else:
        error = gradient_error("reverse_kl", 100_000, schedule, against=divergence)
        yield at_most("dmd2", f"ablation: {divergence} without its weight h(r)", error, 1e-2, must_fail=True)


# -- optima -------------------------------------------------------------------------------------------------------------

#: Best Gaussian (mean, standard deviation, both noised) for the two-mode teacher at one noise level in VE units.
OPTIMA: dict[tuple[str, float], tuple[float, float]] = {
    ("reverse_kl", 0.3): (1.998, 0.503), ("jensen_shannon", 0.3): (0.396, 1.999), ("forward_kl", 0.3): (0.400, 2.022),
    ("reverse_kl", 1.0): (0.339, 1.848), ("jensen_shannon", 1.0): (0.385, 1.981), ("forward_kl", 1.0): (0.400, 2.022),
}  # fmt: skip


def optimum(divergence: Divergence, sigma: float, count: int = 2000, steps: int = 500) -> tuple[float, float]:
    """Where ``DMD2.step`` takes an affine student at one noise level: mean and standard deviation of its samples.

    The student's noise is a fixed grid of normal quantiles, so that the answer has no sampling error of its own.
    """
    schedule = EDM(sigma_min=1e-3, sigma_max=10.0)
    t = float((sigma ** (1 / schedule.rho) - schedule.low) / (schedule.high - schedule.low))
    method = DMD2(
        divergence=divergence, weighting="kl", score_times=(t, t), ratio_normalization="none", critic_steps=1,
        gan=None if divergence == "reverse_kl" else GAN(weight=1e-30, features="teacher", layers=["state"]),
    )
    start = (1.5, 0.8) if divergence == "reverse_kl" and sigma < 0.5 else (0.5, 1.8)
    generator, teacher = AffineGenerator(schedule, (start[0],), (start[1],)), two_modes(schedule)
    roles = Roles(teacher, generator, ExactCritic(generator), discriminator=ExactRatio(teacher, generator))  # type: ignore[arg-type]
    torch.manual_seed(0)
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    optimizer = torch.optim.Adam(generator.parameters(), 0.05, (0.9, 0.99))
    trail = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        batch = Batch(quantiles, Condition(), teacher.sample(count).double())
        _, loss, _ = next(iter(method.step(roles, batch)))
        loss.backward(inputs=generator.parameters())
        optimizer.step()
        optimizer.zero_grad()
        trail.append((float(generator.mean.detach()), float(generator.std.detach())))
    tail = trail[-steps // 5 :]
    return sum(m for m, _ in tail) / len(tail), sum(s for _, s in tail) / len(tail)


def optimum_checks(divergences: Sequence[str]) -> Iterator[Check]:
    """The mode that reverse KL seeks and the moments that forward KL matches: the guide's table, to 1 %."""
    for (divergence, sigma), (mean, std) in OPTIMA.items():
        if divergence in divergences:
            found = optimum(divergence, sigma)  # type: ignore[arg-type]
            error = max(abs(found[0] - mean), abs(found[1] - std)) / std
            yield at_most("dmd2", f"{divergence} optimum on two modes, sigma {sigma:g}: mean {found[0]:.3f}, std {found[1]:.3f}", error, 1e-2)


# -- two time scales ----------------------------------------------------------------------------------------------------


class _MeanCritic(AffineGenerator):
    """A critic with one parameter c, the mean of the student's law, of known unit variance."""

    def __init__(self, schedule: NoiseSchedule, mean: float) -> None:
        super().__init__(schedule, (mean,), (1.0,))

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.mean]

    def predict(self, x_t, t, condition=None, features=()):  # type: ignore[no-untyped-def]
        return self.law().predict(x_t, t, None, features)


def overshoot(critic_steps: int, rate: float = 0.05, steps: int = 400) -> float:
    """How far a student's mean swings past the teacher's: student at 1, teacher at 0, critic rate per update equal to the
    student's. Plain gradient descent on what ``DMD2.step`` yields, rescaled so that its linear dynamics are

        m' = −rate · c,     c' = rate · (m − c)  per critic update.
    """
    schedule = CosineVP()
    t = 0.5  # alpha² = sigma² = 1/2: all laws have unit variance at every level
    method = DMD2(weighting="kl", score_times=(t, t), critic_times=(t, t), critic_steps=critic_steps)
    student, critic = _MeanCritic(schedule, 1.0), _MeanCritic(schedule, 1.0)
    roles = Roles(gaussian(schedule, (0.0,), (1.0,)), student, critic)
    # D_F − D_T = sigma² c and the weight alpha²/sigma²: the student's gradient is alpha² c. The critic's loss has gradient
    # 2 sigma⁴ (c − m): its prediction moves by sigma² per unit of c.
    scale = {"student": rate / 0.5, "critic": rate / (2 * 0.25)}
    quantiles = torch.special.ndtri((torch.arange(64, dtype=torch.float64) + 0.5) / 64)[:, None]
    student.predict = lambda x_t, t, condition=None, features=(): AffineGenerator.predict(student, quantiles, t, condition, features)  # type: ignore[method-assign]
    lowest = 1.0
    with _paired_noise():
        for _ in range(steps):
            for role, loss, _ in method.step(roles, Batch(quantiles, Condition())):
                parameter = roles.parameters(str(role))[0]
                (gradient,) = torch.autograd.grad(loss, parameter)
                with torch.no_grad():
                    parameter.sub_(scale[str(role)] * gradient)
            lowest = min(lowest, float(student.mean.detach()))
    return max(0.0, -lowest)


class _paired_noise:
    """Noise in opposite pairs within a batch: its mean is exactly zero, and a linear recursion sees no sampling error."""

    def __enter__(self) -> None:
        self._original = torch.randn_like

        def balanced(x: Tensor, **options: object) -> Tensor:
            half = self._original(x[: len(x) // 2])
            return torch.cat([half, -half.flip(0)])

        torch.randn_like = balanced  # type: ignore[assignment]

    def __exit__(self, *details: object) -> None:
        torch.randn_like = self._original


def two_time_scale_checks() -> Iterator[Check]:
    """The overshoot of the coupled student and critic (distribution-matching guide, 0.3)."""
    torch.manual_seed(0)
    once = overshoot(1)
    yield between("dmd2", "overshoot with 1 critic update (linear recursion: 0.2875)", once, 0.285, 0.290)
    yield between("dmd2", "overshoot with 2 critic updates (linear recursion: 0.0615)", overshoot(2), 0.060, 0.063)
    yield at_most("dmd2", "overshoot with 4 critic updates", overshoot(4), 1e-3)
    yield at_most("dmd2", "ablation: overshoot on one time scale", once, 1e-3, must_fail=True)


# -- a whole training ---------------------------------------------------------------------------------------------------


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Sliced 1-Wasserstein distance of two equally large sets of 2-D points, over evenly spaced directions."""
    angle = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean())


def trained_ring(method: DMD2, steps: int, batch: int = 512, width: int = 128, seed: int = 0, critic_rate: float = 2e-3) -> tuple[GaussianMixture, Tensor]:
    """(teacher, 8,000 student samples) after training on the ring of eight modes through ``DMD2.step``."""
    torch.manual_seed(seed)
    schedule = CosineVP()
    teacher = ring(schedule)
    student, critic = MLPDenoiser(schedule, 2, width, data_std=1.4), MLPDenoiser(schedule, 2, width, data_std=1.4)
    discriminator = Discriminator({"state": (3,)}, hidden=width) if method.gan is not None else None
    roles = Roles(teacher, student, critic, discriminator=discriminator, state=method.initial_state())
    rates = {"student": 1e-3, "critic": critic_rate} | ({"discriminator": 2e-3} if discriminator is not None else {})

    def draw(step: int) -> Batch:
        return Batch(torch.randn(batch, 2), Condition(), teacher.sample(batch))

    averaged = train(method, roles, draw, steps, rates, betas=(0.0, 0.99), average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), averaged, strict=True):
            p.copy_(value)
        return teacher, student(torch.randn(8000, 2), torch.tensor(1.0, dtype=torch.float64))


def mode_masses(teacher: GaussianMixture, samples: Tensor) -> Tensor:
    """Share of the samples nearest to each mode, (K,)."""
    return torch.bincount(torch.cdist(samples.double(), teacher.means).argmin(1), minlength=len(teacher.means)) / len(samples)


def ring_scores(teacher: GaussianMixture, samples: Tensor, size: int = 1000) -> tuple[float, float]:
    """(largest relative error of a mode's mass, sliced-Wasserstein distance to the teacher over that of two teacher sets),
    the distances averaged over eight pairs of sets of ``size``."""
    error = float((mode_masses(teacher, samples) * len(teacher.means) - 1).abs().max())
    sets = samples[: 8 * size].split(size)
    ours = sum(sliced_wasserstein(s, teacher.sample(size)) for s in sets)
    theirs = sum(sliced_wasserstein(teacher.sample(size), teacher.sample(size)) for _ in sets)
    return error, ours / theirs


MIXTURE = DMD2(
    divergence="reverse_kl", critic_steps=2, weighting="dmd", score_times=(0.02, 0.98), critic_times=(0.01, 0.99),
    gan=GAN(weight=0.3, features="teacher", layers=["state"]),
)
MIXTURE_STEPS = 2000


def mixture_checks() -> Iterator[Check]:
    """Training from scratch on eight modes: all of them, in their proportions, and nothing between them."""
    error, distance = ring_scores(*trained_ring(MIXTURE, MIXTURE_STEPS))
    yield at_most("dmd2", "eight modes: largest relative error of a mode's mass", error, 0.35)
    yield at_most("dmd2", "eight modes: sliced-Wasserstein distance, in teacher–teacher distances", distance, 1.5)
    _, distance = ring_scores(*trained_ring(MIXTURE, 500, critic_rate=0.0))
    yield at_most("dmd2", "ablation: eight modes with a critic that never learns", distance, 1.5, must_fail=True)
