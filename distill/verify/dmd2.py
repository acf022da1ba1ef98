"""DMD2 and f-distill against closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.analytic import AffineGenerator, ExactCritic, ExactRatio, GaussianMixture, MLPDenoiser, gaussian, ring
from distill.denoiser import Condition, Prediction
from distill.losses.adversarial import Discriminator
from distill.losses.divergence import DIVERGENCES, GENERATORS, Divergence
from distill.matching.adversary import GAN
from distill.matching.critic import Adaptive
from distill.methods.base import Batch
from distill.methods.dmd2 import DMD2
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.core import Check, at_most, between, descend, relative_error, replaced, student_loss, train

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
        yield from schedule_checks()
    yield from optimum_checks(wanted)
    if divergences is None:
        yield from lag_checks()
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


def exact_method(divergence: Divergence, times: tuple[float, float]) -> DMD2:
    """The distribution-matching term as the mathematics has it: the weight of the exact KL, ratios as they are. The GAN is
    there for its discriminator alone."""
    gan = None if divergence == "reverse_kl" else GAN(weight=1e-30, features="teacher", layers=["state"])
    return DMD2(divergence=divergence, weighting="exact", score_times=times, ratio_normalization="none", critic_steps=1, gan=gan)


def estimated_gradient(
    divergence: Divergence, count: int, schedule: NoiseSchedule, stale: bool = False, upside_down: bool = False
) -> Tensor:
    """The gradient that ``DMD2.step`` yields for its student, with an exact critic and an exact density ratio.

    Args:
        stale: the ablation of the critic: one that stands for another student.
        upside_down: the ablation of the ratio: q/p in place of p/q.
    """
    generator, teacher = AffineGenerator(schedule, *STUDENT), close_modes(schedule)
    critic = ExactCritic(AffineGenerator(schedule, (1.0,), (0.5,)) if stale else generator)
    ratio = ExactRatio(teacher, generator, upside_down)
    roles = Roles(teacher, generator, critic, discriminator=ratio)  # type: ignore[arg-type]
    batch = Batch(torch.randn(count, 1, dtype=torch.float64), Condition(), teacher.sample(count).double())
    role, loss, _ = next(iter(exact_method(divergence, TIMES).step(roles, batch)))
    assert role == "student"
    loss.backward(inputs=generator.parameters())
    assert generator.mean.grad is not None and generator.std.grad is not None
    return torch.cat([generator.mean.grad, generator.std.grad])


def gradient_checks(divergence: Divergence) -> Iterator[Check]:
    """Against autograd of the closed form (quadrature), at 1e5 samples and in how the error shrinks; an estimator that lacks
    the divergence's own part is biased: it misses the same bound, even when scaled to fit best."""
    schedule, n, bound = CosineVP(), 100_000, 1e-2
    truth = true_gradient(divergence, schedule)
    torch.manual_seed(0)
    counts, repeats = (1_000, 10_000, n), (64, 32, 24)
    errors = [[relative_error(estimated_gradient(divergence, n, schedule), truth) for _ in range(r)] for n, r in zip(counts, repeats, strict=True)]
    rms = [math.sqrt(sum(e**2 for e in row) / len(row)) for row in errors]
    yield at_most("dmd2", f"{divergence} gradient against autograd, n = 1e5", rms[-1], bound)
    slope = float(np.polyfit(np.log(counts), np.log(rms), 1)[0])
    yield between("dmd2", f"{divergence} gradient error's slope in n (1/√n)", slope, -0.65, -0.35)
    ablations = {
        "a critic that does not follow the student": lambda: estimated_gradient(divergence, n, schedule, stale=True),
        "no weight h(r)": lambda: estimated_gradient("reverse_kl", n, schedule),
        "the ratio upside down": lambda: estimated_gradient(divergence, n, schedule, upside_down=True),
    }
    for what, ablated in ablations.items():
        if divergence != "reverse_kl" or what.startswith("a critic"):
            gradient = ablated()
            best = gradient * (gradient @ truth / gradient.square().sum())
            yield at_most("dmd2", f"ablation: {divergence}, {what}", relative_error(best, truth), bound, must_fail=True)


def schedule_checks() -> Iterator[Check]:
    """The same under the other schedules."""
    for schedule in (EDM(sigma_max=10.0), Flow()):
        torch.manual_seed(0)
        error = relative_error(estimated_gradient("reverse_kl", 100_000, schedule), true_gradient("reverse_kl", schedule))
        yield at_most("dmd2", f"reverse_kl gradient, {type(schedule).__name__} schedule, n = 1e5", error, 1e-2)


# -- optima -------------------------------------------------------------------------------------------------------------

#: Best Gaussian (mean, standard deviation, both noised) for the two-mode teacher at one noise level in VE units.
OPTIMA: dict[tuple[str, float], tuple[float, float]] = {
    ("reverse_kl", 0.3): (1.998, 0.503), ("jensen_shannon", 0.3): (0.396, 1.999), ("forward_kl", 0.3): (0.400, 2.022),
    ("reverse_kl", 1.0): (0.339, 1.848), ("jensen_shannon", 1.0): (0.385, 1.981), ("forward_kl", 1.0): (0.400, 2.022),
}  # fmt: skip


def independent_normals(count: int) -> tuple[Tensor, Tensor]:
    """Two independent unit normals, (count, 1), from a Sobol sequence: next to no sampling error."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64)
    z, noise = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).split(1, 1)
    return z, noise


def optimum(divergence: Divergence, sigma: float, steps: int = 200) -> tuple[float, float]:
    """Where ``DMD2.step`` takes an affine student at one noise level: mean and standard deviation of its samples.

    Both its noise and the noise added to its samples are quasi-random: the answer has hardly any sampling error.
    """
    schedule = EDM(sigma_min=1e-3, sigma_max=10.0)
    t = float((sigma ** (1 / schedule.rho) - schedule.low) / (schedule.high - schedule.low))
    method = exact_method(divergence, (t, t))
    start = (1.5, 0.8) if divergence == "reverse_kl" and sigma < 0.5 else (0.5, 1.8)
    generator, teacher = AffineGenerator(schedule, (start[0],), (start[1],)), two_modes(schedule)
    roles = Roles(teacher, generator, ExactCritic(generator), discriminator=ExactRatio(teacher, generator))  # type: ignore[arg-type]
    z, noise = independent_normals(8192)
    batch = Batch(z, Condition(), z)  # real samples: none are needed, the discriminator knows the ratio
    with replaced(torch, "randn_like", lambda x: noise):
        descend(generator.parameters(), lambda: student_loss(method, roles, batch), steps, 0.05, (0.9, 0.99))
    return float(generator.mean.detach()), float(generator.std.detach())


def optimum_checks(divergences: Sequence[str]) -> Iterator[Check]:
    """The mode that reverse KL seeks and the moments that forward KL matches: the guide's table, to 1 % of each number."""
    for (divergence, sigma), (mean, std) in OPTIMA.items():
        if divergence in divergences:
            found = optimum(divergence, sigma)  # type: ignore[arg-type]
            error = max(abs(found[0] / mean - 1), abs(found[1] / std - 1))
            yield at_most("dmd2", f"{divergence} optimum on two modes, sigma {sigma:g}: mean {found[0]:.3f}, std {found[1]:.3f}", error, 1e-2)


# -- two time scales ----------------------------------------------------------------------------------------------------


class MeanCritic(AffineGenerator):
    """The denoiser of N(c, 1), which learns c."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        return self.law().predict(x_t, t, None, features)


def opposite_pairs(x: Tensor) -> Tensor:
    """Noise like x whose mean over the batch is exactly zero: a linear recursion sees no sampling error."""
    half = torch.randn(len(x) // 2, *x.shape[1:], dtype=x.dtype)
    return torch.cat([half, -half.flip(0)])


def overshoot(critic_steps: int | Adaptive, rate: float = 0.05, steps: int = 400, batch: int = 64) -> float:
    """How far a student's mean swings past the teacher's: student at 1, teacher at 0, critic rate per update equal to the
    student's. Plain gradient descent on what ``DMD2.step`` yields, rescaled so that its linear dynamics are

        m' = −rate · c,     c' = rate · (m − c)  per critic update.
    """
    schedule = CosineVP()
    t = 0.5  # alpha² = sigma² = 1/2: all laws have unit variance at every level
    method = DMD2(weighting="exact", score_times=(t, t), critic_times=(t, t), critic_steps=critic_steps)
    student, critic = AffineGenerator(schedule, (1.0,), (1.0,)), MeanCritic(schedule, (1.0,), (1.0,))
    roles = Roles(gaussian(schedule, (0.0,), (1.0,)), student, critic, state=method.initial_state())
    # D_F − D_T = sigma² c and the weight alpha²/sigma²: the student's gradient is alpha² c. The critic's loss has gradient
    # 2 sigma⁴ (c − m): its prediction moves by sigma² per unit of c.
    scale = {"student": rate / 0.5, "critic": rate / (2 * 0.25)}
    lowest = 1.0
    with replaced(torch, "randn_like", opposite_pairs):
        for _ in range(steps):
            noise = opposite_pairs(torch.empty(batch, 1, dtype=torch.float64))
            for role, loss, _ in method.step(roles, Batch(noise, Condition())):
                mean = roles.parameters(str(role))[0]
                (gradient,) = torch.autograd.grad(loss, mean)
                with torch.no_grad():
                    mean.sub_(scale[str(role)] * gradient)
            lowest = min(lowest, float(student.mean.detach()))
    return max(0.0, -lowest)


def two_time_scale_checks() -> Iterator[Check]:
    """The overshoot of the coupled student and critic (distribution-matching guide, 0.3)."""
    torch.manual_seed(0)
    once = overshoot(1)
    yield between("dmd2", "overshoot with 1 critic update (linear recursion: 0.2875)", once, 0.285, 0.290)
    yield between("dmd2", "overshoot with 2 critic updates (linear recursion: 0.0615)", overshoot(2), 0.060, 0.063)
    yield at_most("dmd2", "overshoot with 4 critic updates", overshoot(4), 1e-3)
    for lag in (0.25, 0.5):
        yield at_most("dmd2", f"overshoot with critic updates by need, lag {lag:g}", overshoot(Adaptive(lag=lag), batch=16384), 5e-3)
    yield at_most("dmd2", "ablation: by need, and at most 2", overshoot(Adaptive(at_most=2), batch=16384), 5e-3, must_fail=True)
    yield at_most("dmd2", "ablation: overshoot on one time scale", once, 1e-3, must_fail=True)


class HalfWay(ExactCritic):
    """A share of the way from the teacher's denoiser to the student's own."""

    def __init__(self, generator: AffineGenerator, teacher: GaussianMixture, share: float) -> None:
        super().__init__(generator)
        self.teacher, self.share = teacher, share

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        own, theirs = super().predict(x_t, t).x0, self.teacher.predict(x_t, t).x0
        return Prediction(theirs + self.share * (own - theirs), "x0", x_t, t, self.schedule)


def measured_lag(share: float, samples: int = 200_000) -> float:
    """The critic's lag as ``DMD2.step`` measures it in one step."""
    torch.manual_seed(0)
    schedule = CosineVP()
    generator, teacher = AffineGenerator(schedule, (1.0,), (0.8,)), gaussian(schedule, (0.0,), (1.0,))
    method = DMD2(critic_steps=Adaptive(), score_times=(0.2, 0.8))
    roles = Roles(teacher, generator, HalfWay(generator, teacher, share), state=method.initial_state())
    _, _, logs = next(iter(method.step(roles, Batch(torch.randn(samples, 1, dtype=torch.float64), Condition()))))
    return float(logs["critic_lag"])


def lag_checks() -> Iterator[Check]:
    """The lag's estimator: a critic that is a share c of the way has lag (1 − c)/c."""
    for share, lag in ((0.5, 1.0), (0.8, 0.25), (1.25, 0.2)):
        yield between("dmd2", f"lag of a critic that has come {share:g} of the way (closed form {lag:g})", measured_lag(share), lag - 0.03, lag + 0.03)
    yield at_most("dmd2", "lag of a critic that is there", measured_lag(1.0), 0.01)
    yield at_most("dmd2", "the same from a batch of 64: its noise is no lag", measured_lag(1.0, 64), 0.25)


# -- a whole training ---------------------------------------------------------------------------------------------------


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Sliced 1-Wasserstein distance of two equally large sets of 2-D points, over evenly spaced directions."""
    angle = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean())


def trained_ring(method: DMD2, steps: int, seed: int = 0, critic_rate: float = 3e-3) -> tuple[GaussianMixture, Tensor]:
    """(teacher, 8,000 student samples) after training on a ring of eight modes, 5 standard deviations apart, through
    ``DMD2.step``."""
    torch.manual_seed(seed)
    schedule, batch, width = CosineVP(), 512, 64
    teacher = ring(schedule, std=0.3)
    student, critic = MLPDenoiser(schedule, 2, width, data_std=1.4), MLPDenoiser(schedule, 2, width, data_std=1.4)
    discriminator = Discriminator({"state": (3,)}, hidden=width) if method.gan is not None else None
    roles = Roles(teacher, student, critic, discriminator=discriminator, state=method.initial_state())
    rates = {"student": 3e-3, "critic": critic_rate} | ({"discriminator": 2e-3} if discriminator is not None else {})

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


def ring_scores(teacher: GaussianMixture, samples: Tensor, size: int = 1000, pairs: int = 8) -> tuple[float, float]:
    """(largest relative error of a mode's mass, sliced-Wasserstein distance to the teacher over that of two teacher sets),
    the distances between sets of ``size``, each of the student's against ``pairs`` of the teacher's."""
    error = float((mode_masses(teacher, samples) * len(teacher.means) - 1).abs().max())
    ours = [sliced_wasserstein(x, teacher.sample(size)) for x in samples.split(size) for _ in range(pairs)]
    theirs = [sliced_wasserstein(teacher.sample(size), teacher.sample(size)) for _ in ours]
    return error, sum(ours) / sum(theirs)


MIXTURE = DMD2(
    divergence="reverse_kl", critic_steps=4, weighting="dmd", score_times=(0.02, 0.98), critic_times=(0.01, 0.99),
    gan=GAN(weight=0.3, features="teacher", layers=["state"]),
)
MIXTURE_STEPS = 2000


def mixture_checks() -> Iterator[Check]:
    """Training from scratch on eight modes: all of them, in their proportions, and nothing between them."""
    error, distance = ring_scores(*trained_ring(MIXTURE, MIXTURE_STEPS))
    yield at_most("dmd2", "eight modes: largest relative error of a mode's mass", error, 0.35)
    yield at_most("dmd2", "eight modes: sliced-Wasserstein distance, in teacher–teacher distances", distance, 1.5)
    # Less than a third of the training is enough for both bounds when the critic learns.
    error, distance = ring_scores(*trained_ring(MIXTURE, 600, critic_rate=0.0))
    yield at_most("dmd2", "ablation: a critic that never learns, error of a mode's mass", error, 0.35, must_fail=True)
    yield at_most("dmd2", "ablation: a critic that never learns, sliced-Wasserstein distance", distance, 1.5, must_fail=True)
