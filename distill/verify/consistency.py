"""Consistency distillation against the exact probability-flow map."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.analytic import GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.methods.base import Batch
from distill.methods.consistency import Consistency, consistency_function
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, Kind, NoiseSchedule
from distill.verify.core import Check, at_most, between, train

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
        # A mixed pair: every sample gets the interval i, as if drawn.
        original = torch.randint
        torch.randint = lambda n, shape, i=i, **_: torch.full(shape, i)  # type: ignore[assignment]
        try:
            _, loss, _ = next(iter(method.step(roles, Batch(noise, Condition(), x0 * std))))
        finally:
            torch.randint = original  # type: ignore[assignment]
        (gradient,) = torch.autograd.grad(loss, student.slopes, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient[i + 1], student.slopes)
        with torch.no_grad():
            student.slopes[i + 1] -= gradient[i + 1] / curvature[i + 1]
    exact = std / math.sqrt(std**2 + schedule.high ** (2 * schedule.rho))
    return float(student.slopes[-1].detach()) / exact


def finite_grid_checks() -> Iterator[Check]:
    """The guide's finite-N table: the right check is convergence to the finite-N value, not to 1."""
    for solver, intervals, expected in (("ddim", 8, 0.707), ("heun", 8, 1.264), ("ddim", 64, 0.958), ("heun", 64, 1.0034)):
        value = finite_grid_ratio(intervals, solver)
        yield between("consistency", f"finite-grid optimum, {solver}, {intervals} intervals (closed form {expected})", value, expected * 0.99, expected * 1.01)
    first_order = finite_grid_ratio(8, "ddim")
    yield between("consistency", "ablation: first-order solver in place of Heun, 8 intervals", first_order, 1.264 * 0.99, 1.264 * 1.01, must_fail=True)


# -- the boundary -------------------------------------------------------------------------------------------------------


def boundary_checks() -> Iterator[Check]:
    """f(x, 0) = x for any weights, bit by bit; without it the loss is solved by a constant."""
    torch.manual_seed(0)
    schedule = CosineVP()
    network = MLPDenoiser(schedule, 2)
    x = torch.randn(64, 2)
    difference = (consistency_function(network, x, torch.zeros(64, dtype=torch.float64), None) - x).detach().abs().max()
    yield at_most("consistency", "f(x, 0) − x, random weights", float(difference), 0.0)
    without = network(x, torch.full((64,), schedule.t_min, dtype=torch.float64))
    yield at_most("consistency", "ablation: the network itself near t = 0", float((without - x).detach().abs().max()), 0.0, must_fail=True)


# -- the trained map ----------------------------------------------------------------------------------------------------

MAP = Consistency(discretization=(16, 64), steps=4, solver="heun", metric="l2", target="ema", ema_decay=0.95, weighting="uniform")


def trained_map(schedule: NoiseSchedule, method: Consistency = MAP, steps: int = 3000, batch: int = 512) -> tuple[GaussianMixture, MLPDenoiser]:
    """(teacher, student) after training an MLP on a Gaussian through ``Consistency.step``."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    student, target = (MLPDenoiser(schedule, 2, width=64, data_std=0.8) for _ in range(2))
    target.load_state_dict(student.state_dict())
    roles = Roles(teacher, student, target=target if method.target == "ema" else None)
    averaged = train(method, roles, lambda step: Batch(torch.randn(batch, 2), Condition(), teacher.sample(batch)), steps, {"student": 4e-3}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), averaged, strict=True):
            p.copy_(value)
    return teacher, student


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
    for schedule in (CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow()):
        teacher, student = trained_map(schedule)
        name = type(schedule).__name__
        for t in (1.0, 0.5):
            yield at_most("consistency", f"trained map against the exact PF-ODE map, {name}, t = {t:g}", map_error(teacher, student, t), 0.02)
        if name == "CosineVP":  # what the teacher's own denoiser says at t = 1 is the mean: the map is not there untrained
            yield at_most("consistency", "ablation: the teacher's x0-prediction in place of the map", map_error(teacher, teacher), 0.02, must_fail=True)
    method = MAP.model_copy(update={"discretization": (4, 4), "solver": "ddim"})
    teacher, student = trained_map(CosineVP(), method, steps=600)
    yield at_most("consistency", "ablation: four first-order intervals", map_error(teacher, student), 0.02, must_fail=True)


# -- guidance -----------------------------------------------------------------------------------------------------------


class _ScaleTold(MLPDenoiser):
    """An MLP that is told the guidance scale: a third coordinate of its input."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__(schedule, 2, width=64, data_std=1.0)
        self.net[0] = nn.Linear(2 + 8 + 1, 64)
        self.told: Tensor | None = None

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: tuple[str, ...] = ()) -> Prediction:  # type: ignore[override]
        assert condition is not None and condition.guidance is not None
        t = t.expand(len(x_t))
        alpha, sigma = (c.float() for c in self.schedule.coefficients(x_t, t))
        variance = alpha**2 + sigma**2
        level = torch.atan2(sigma, alpha)
        embedding = torch.cat([f(level * k) for k in (1.0, 2.0, 4.0, 8.0) for f in (torch.sin, torch.cos)], 1)
        scale = condition.guidance.to(x_t)[:, None] - 2
        out = self.net(torch.cat([x_t / variance.sqrt(), embedding, scale], 1))
        return Prediction(alpha / variance * x_t + sigma / variance.sqrt() * out, "x0", x_t, t, self.schedule)


def guidance_checks() -> Iterator[Check]:
    """Two classes of equal variance: the w-guided ODE is that of N(mu_0 + w (mu_c − mu_0), s²). A student that is told w
    reproduces it, also at scales between those it saw; one trained at a fixed w does not follow."""
    torch.manual_seed(0)
    schedule = CosineVP()
    # The null law is a Gaussian of its own (fixture GC of the guide), so that the guided ODE has a closed form.
    teacher = GaussianMixture(schedule, torch.tensor([[0.6, 0.2], [-0.2, 0.1]]), torch.full((2, 1), 0.5))
    labels = torch.zeros(512, dtype=torch.long)
    condition = Condition({"class_labels": labels}, {"class_labels": labels + 1})
    method = MAP.model_copy(update={"guidance_range": (1.0, 3.0)})
    student, target = _ScaleTold(schedule), _ScaleTold(schedule)
    target.load_state_dict(student.state_dict())
    data = GaussianMixture(schedule, teacher.means[:1], teacher.stds[:1])
    roles = Roles(teacher, student, target=target)
    averaged = train(method, roles, lambda step: Batch(torch.randn(512, 2), condition, data.sample(512)), 2000, {"student": 3e-3}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), averaged, strict=True):
            p.copy_(value)
        noise, t = torch.randn(4000, 2), torch.ones(4000, dtype=torch.float64)
        for w in (1.0, 1.7, 2.5):
            told = Condition(guidance=torch.full((4000,), w))
            mean = student(noise, t, told).mean(0) - noise.mean(0) * 0.5
            expected = teacher.means[1] + w * (teacher.means[0] - teacher.means[1])
            yield at_most("consistency", f"guided Gaussian: error of the mean at w = {w:g}, in data deviations", float((mean - expected).norm() / 0.5), 0.05)
        deaf = student(noise, t, Condition(guidance=torch.full((4000,), 1.7))).mean(0) - noise.mean(0) * 0.5
        expected = teacher.means[1] + 2.5 * (teacher.means[0] - teacher.means[1])
        yield at_most("consistency", "ablation: a student that is not told w (w = 1.7 for 2.5)", float((deaf - expected).norm() / 0.5), 0.05, must_fail=True)
