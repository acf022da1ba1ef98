"""Consistency distillation against the exact probability-flow map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from distill.analytic import GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.methods import consistency as rule
from distill.methods.base import Batch
from distill.methods.consistency import Consistency, consistency_function
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, Kind, NoiseSchedule
from distill.verify.core import Check, at_most, between, replaced, train

DATA = ((0.5, -0.3), (0.6, 0.9))  #: mean and standard deviation of the Gaussian teacher


def checks() -> Iterator[Check]:
    """All checks of the method."""
    yield from finite_grid_checks()
    yield from boundary_checks()
    yield from map_checks()
    yield from guidance_checks()


# -- the finite-N optimum -----------------------------------------------------------------------------------------------


class LinearOnGrid(Denoiser):
    """f(x, t_i) = a_i x, one slope per grid point: the family in which the optimum for zero-mean Gaussian data lies."""

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule, slopes: Tensor) -> None:
        self.schedule, self.slopes = schedule, nn.Parameter(slopes)

    def parameters(self) -> list[nn.Parameter]:
        return [self.slopes]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: tuple[str, ...] = ()) -> Prediction:  # type: ignore[override]
        index = (t * (len(self.slopes) - 1)).round().long().expand(len(x_t))
        return Prediction(self.slopes[index][:, None] * x_t, "x0", x_t, t, self.schedule)


def finite_grid_ratio(intervals: int, solver: str, std: float = 0.6, passes: int = 1, samples: int = 256) -> float:
    """The linear student's standard deviation at t = 1 over the exact map's, at the fixed point of ``Consistency.step``.

    L2 on a zero-mean Gaussian decouples over the grid: given the slope at s, the best one at t is a ratio of two moments.
    They are read from what the method itself yields: its loss is quadratic in the slopes, so one Newton step per interval
    (gradient and curvature by autograd) is exact, going up from the boundary.
    """
    schedule = EDM(0.002, 80.0, 7.0)
    teacher = gaussian(schedule, (0.0,), (std,))
    method = Consistency(discretization=(intervals, intervals), steps=1, solver=solver, metric="l2", target="stop_gradient")  # type: ignore[arg-type]
    slopes = torch.zeros(intervals + 1, dtype=torch.float64)
    slopes[0] = 1.0
    student = LinearOnGrid(schedule, slopes)
    roles = Roles(teacher, student)
    quantiles = torch.special.ndtri((torch.arange(samples, dtype=torch.float64) + 0.5) / samples)
    first = quantiles / quantiles.std(correction=0)
    # A product grid of two unit normals, uncorrelated exactly: the moments have no sampling error.
    x0, noise = (g.reshape(-1, 1) for g in torch.meshgrid(first, first, indexing="ij"))
    for i in range(intervals):
        with replaced(rule, "snapped", lambda t, n, i=i: torch.full_like(t, (i + 1) / n)):  # every sample draws interval i
            _, loss, _ = next(iter(method.step(roles, Batch(noise, Condition(), x0 * std))))
        (gradient,) = torch.autograd.grad(loss, student.slopes, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient[i + 1], student.slopes)
        with torch.no_grad():
            student.slopes[i + 1] -= gradient[i + 1] / curvature[i + 1]
    exact = std / math.sqrt(std**2 + schedule.high ** (2 * schedule.rho))
    return float(student.slopes[-1].detach()) / exact


def straight_ratio(intervals: int, std: float = 0.6) -> float:
    """The same for real data in the solver's place, in closed form: the best slope at t is a_s E[x_t x_s]/E[x_t²], so that
    every interval shrinks the sample's deviation by the correlation of x_t and x_s, which share x0 and the noise."""
    sigma = EDM(0.002, 80.0, 7.0).sigma(torch.arange(intervals + 1, dtype=torch.float64) / intervals)
    deviation = (std**2 + sigma**2).sqrt()
    correlation = (std**2 + sigma[1:] * sigma[:-1]) / (deviation[1:] * deviation[:-1])
    return float(correlation.prod() * deviation[0] / std)


def finite_grid_checks() -> Iterator[Check]:
    """The guide's finite-N table: the right check is convergence to the finite-N value, not to 1."""
    for solver, intervals, expected in (("ddim", 8, 0.707), ("heun", 8, 1.264), ("ddim", 64, 0.958), ("heun", 64, 1.0034)):
        value = finite_grid_ratio(intervals, solver)
        yield between("consistency", f"finite-grid optimum, {solver}, {intervals} intervals (closed form {expected})", value, expected * 0.99, expected * 1.01)
    for intervals in (8, 64):
        value, expected = finite_grid_ratio(intervals, "data"), straight_ratio(intervals)
        title = f"finite-grid optimum, real data, {intervals} intervals (closed form {expected:.3f})"
        yield between("consistency", title, value, expected * 0.99, expected * 1.01)
    with replaced(rule, "straight_step", lambda schedule, x0, noise, s: schedule.add_noise(x0, noise.flip(0).roll(1, 0), s)):
        value = finite_grid_ratio(64, "data")
    expected = straight_ratio(64)
    yield between("consistency", "ablation: another noise at s than at t, real data, 64 intervals", value, expected * 0.99, expected * 1.01, must_fail=True)
    first_order = finite_grid_ratio(8, "ddim")
    yield between("consistency", "ablation: first-order solver in place of Heun, 8 intervals", first_order, 1.264 * 0.99, 1.264 * 1.01, must_fail=True)


# -- the boundary -------------------------------------------------------------------------------------------------------


def without_boundary(network: Denoiser, x: Tensor, t: Tensor, condition: Condition | None, end: Tensor | None = None) -> Tensor:
    """The ablation of ``consistency_function``: the network alone, also at t = 0."""
    return network(x, t.clamp_min(network.schedule.t_min), condition)


def boundary_checks() -> Iterator[Check]:
    """f(x, 0) = x for any weights, bit by bit. With it a network that has no skip connection learns the map; without it
    the loss is solved by a constant, and is."""
    torch.manual_seed(0)
    network, x = MLPDenoiser(CosineVP(), 2), torch.randn(64, 2)
    difference = (consistency_function(network, x, torch.zeros(64, dtype=torch.float64), None) - x).detach().abs().max()
    yield at_most("consistency", "f(x, 0) − x, random weights", float(difference), 0.0)
    coarse = MAP.model_copy(update={"discretization": (8, 8)})
    found = spread(*trained_map(CosineVP(), coarse, 600, skip=False))
    yield between("consistency", "student's standard deviation over the data's, eight intervals", found, 0.9, 1.1)
    with replaced(rule, "consistency_function", without_boundary):
        collapsed = spread(*trained_map(CosineVP(), coarse, 600, skip=False))
    yield between("consistency", "ablation: the same without the boundary (collapses to a constant)", collapsed, 0.9, 1.1, must_fail=True)


@torch.no_grad()
def spread(teacher: GaussianMixture, student: Denoiser) -> float:
    """Standard deviation of one-step samples over the data's, mean over dimensions."""
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)) * teacher.schedule.initial_scale
    return float((student(noise, torch.tensor(1.0, dtype=torch.float64)).std(0) / teacher.stds[0]).mean())


# -- the trained map ----------------------------------------------------------------------------------------------------

MAP = Consistency(discretization=(8, 64), steps=4, solver="heun", metric="l2", target="ema", ema_decay=0.95, weighting="uniform")


def trained_map(
    schedule: NoiseSchedule, method: Consistency = MAP, steps: int = 3000, batch: int = 512, skip: bool = True
) -> tuple[GaussianMixture, MLPDenoiser]:
    """(teacher, student) after training an MLP on a Gaussian through ``Consistency.step``."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    student, target = (MLPDenoiser(schedule, 2, width=64, data_std=0.8, skip=skip) for _ in range(2))
    fit(method, Roles(teacher, student, target=target), lambda step: Batch(torch.randn(batch, 2), Condition(), teacher.sample(batch)), steps)
    return teacher, student


def fit(method: Consistency, roles: Roles, batches: Callable[[int], Batch], steps: int) -> None:
    """Train the student, from the target's weights, and leave it with its averaged ones."""
    student, target = roles.student, roles.target
    assert isinstance(student, nn.Module) and isinstance(target, nn.Module)
    target.load_state_dict(student.state_dict())
    averaged = train(method, roles, batches, steps, {"student": 4e-3}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), averaged, strict=True):
            p.copy_(value)


@torch.no_grad()
def map_error(teacher: GaussianMixture, student: Denoiser, t: float = 1.0) -> float:
    """RMS of student − exact PF-ODE map at noise level t, over the RMS deviation of the data from its mean."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = teacher.sample(4000, generator), torch.randn(4000, 2, generator=generator)
    level = torch.full((4000,), t, dtype=torch.float64)
    x_t = teacher.schedule.add_noise(x0, noise, level)
    exact = teacher.flow_map(x_t, level, torch.zeros(4000, dtype=torch.float64))
    return float((student(x_t, level) - exact).square().mean().sqrt() / (exact - exact.mean(0)).square().mean().sqrt())


def map_checks() -> Iterator[Check]:
    """One evaluation gives what the ODE gives, at the noisiest level and half-way; a posterior mean or a solver that is too
    coarse does not."""
    for schedule in (CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow()):
        teacher, student = trained_map(schedule)
        for t in (1.0, 0.5):
            error = map_error(teacher, student, t)
            yield at_most("consistency", f"trained map against the exact PF-ODE map, {type(schedule).__name__}, t = {t:g}", error, 0.02)
    denoised = gaussian(CosineVP(), *DATA)
    with replaced(rule, "consistency_function", lambda network, x, t, condition, end: without_boundary(denoised, x, t, condition)):
        teacher, student = trained_map(CosineVP(), steps=1000)
    yield at_most("consistency", "ablation: the teacher's own x0-prediction as the target", map_error(teacher, student), 0.02, must_fail=True)
    teacher, student = trained_map(CosineVP(), MAP.model_copy(update={"discretization": (4, 4), "solver": "ddim"}), steps=1000)
    yield at_most("consistency", "ablation: four first-order intervals", map_error(teacher, student), 0.02, must_fail=True)


# -- guidance -----------------------------------------------------------------------------------------------------------


class _ScaleTold(MLPDenoiser):
    """An MLP that is told the guidance scale, as a last coordinate of its input; deaf, it is there but always zero."""

    def __init__(self, schedule: NoiseSchedule, deaf: bool) -> None:
        super().__init__(schedule, 2, width=64, data_std=0.8)
        self.net[0] = nn.Linear(2 + 8 + 1, 64)
        self.deaf = deaf

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        assert condition is not None and condition.guidance is not None
        scale = condition.guidance.to(x_t)[:, None] - 2
        return torch.cat([super().inputs(x_t, t, condition), scale * (not self.deaf)], 1)


@torch.no_grad()
def guided_mean_error(student: Denoiser, teacher: GaussianMixture, w: float) -> float:
    """Distance of the mean of one-step samples, told w, to mu_0 + w (mu_c − mu_0), in standard deviations of the data."""
    noise, std = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)), float(teacher.stds[0, 0])
    x = student(noise, torch.tensor(1.0, dtype=torch.float64), Condition(guidance=torch.full((4000,), w)))
    expected = teacher.means[1] + w * (teacher.means[0] - teacher.means[1])
    return float(((x - std * noise).mean(0) - expected).norm() / std)


def trained_guided(schedule: NoiseSchedule, steps: int, deaf: bool) -> tuple[GaussianMixture, Denoiser]:
    """(teacher, student) for two classes of equal variance, one of which plays the null condition: the w-guided ODE is
    then that of N(mu_0 + w (mu_c − mu_0), s²) (fixture GC of the guide)."""
    torch.manual_seed(0)
    teacher = GaussianMixture(schedule, torch.tensor([[0.4, 0.2], [-0.2, 0.1]]), torch.full((2, 1), 0.8))
    labels = torch.zeros(512, dtype=torch.long)
    condition = Condition({"class_labels": labels}, {"class_labels": labels + 1})
    data = GaussianMixture(schedule, teacher.means[:1], teacher.stds[:1])
    roles = Roles(teacher, _ScaleTold(schedule, deaf), target=_ScaleTold(schedule, deaf))
    method = MAP.model_copy(update={"guidance_range": (1.0, 3.0)})
    fit(method, roles, lambda step: Batch(torch.randn(512, 2), condition, data.sample(512)), steps)
    return teacher, roles.student


def guidance_checks() -> Iterator[Check]:
    """A student that is told the scale follows it; one trained on the same scales and not told gives their average."""
    teacher, student = trained_guided(CosineVP(), 2000, deaf=False)
    for w in (1.0, 1.7, 2.5):
        yield at_most("consistency", f"guided Gaussian: error of the mean at w = {w:g}, in data deviations", guided_mean_error(student, teacher, w), 0.03)
    teacher, student = trained_guided(CosineVP(), 1000, deaf=True)
    yield at_most("consistency", "ablation: a student that is not told w, at w = 2.5", guided_mean_error(student, teacher, 2.5), 0.03, must_fail=True)
