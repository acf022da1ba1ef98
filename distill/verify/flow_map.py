"""Flow maps against the exact map of a Gaussian, under three schedules: residuals, trained maps, what must not be left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.analytic import ExactFlowMap, GaussianMixture, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.flow import invert, jump
from distill.matching.time_pairs import TimePairs
from distill.methods import flow_map as rule
from distill.methods.base import Batch
from distill.methods.flow_map import FlowMap
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, Kind, NoiseSchedule
from distill.verify.core import Check, at_most, replaced, train

DATA = ((0.5, -0.3), (0.6, 0.9))  #: mean and standard deviation of the Gaussian teacher
SCHEDULES: dict[str, NoiseSchedule] = {"VP": CosineVP(), "EDM": EDM(sigma_max=20.0), "flow": Flow()}
TARGETS = ("eulerian", "lagrangian", "progressive", "teacher_step")
STEPS = (1, 2, 4, 8, 16)
STEPS_OF = {"lagrangian": 1200, "teacher_step": 1200}  #: training of those that learn the longest jump last
#: one long step is the hardest: some of the jumps are that one
PAIRS = TimePairs(to_data=0.2, from_noise=0.3)
DATA_STEPS = 1500  #: where u is data's; of twice the batch


def checks() -> Iterator[Check]:
    """All checks of the method."""
    yield from residual_checks()
    yield from map_checks()
    yield from data_checks()
    yield from ablation_checks()
    yield from inversion_checks()


# -- residuals ----------------------------------------------------------------------------------------------------------


def residual(method: FlowMap, schedule: NoiseSchedule, wrong: bool = False, samples: int = 2000) -> float:
    """The loss (L2) of the exact map, or of another Gaussian's, in float64."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    student = ExactFlowMap(teacher, gaussian(schedule, DATA[0], (0.7, 0.9)) if wrong else None)
    batch = Batch(torch.randn(samples, 2, dtype=torch.float64), Condition(), teacher.sample(samples).double())
    return float(next(iter(method.step(Roles(teacher, student), batch)))[1].detach())


def deviation(method: FlowMap, schedule: NoiseSchedule, wrong: bool = False, batches: int = 30) -> float:
    """Largest |mean| of the loss's derivatives in the map's shift and tilt over their standard errors: where u is data's, only the
    means are zero."""
    torch.manual_seed(0)
    teacher = gaussian(schedule, *DATA)
    student = ExactFlowMap(teacher, gaussian(schedule, DATA[0], (0.7, 0.9)) if wrong else None)
    slopes = []
    for _ in range(batches):
        batch = Batch(torch.randn(2000, 2, dtype=torch.float64), Condition(), teacher.sample(2000).double())
        loss = next(iter(method.step(Roles(teacher, student), batch)))[1]
        slopes.append(torch.autograd.grad(loss, student.change)[0])
    slope = torch.stack(slopes)
    return float((slope.mean(0).abs() / (slope.std(0) / math.sqrt(batches))).max())


def residual_checks() -> Iterator[Check]:
    """Every right-hand side is the exact map's own, and no other map's."""
    for name, schedule in SCHEDULES.items():
        for target in TARGETS:
            method = FlowMap(target=target, solver_steps=8, reach=0.05)  # type: ignore[arg-type]
            yield at_most("flow_map", f"{name}, {target}: residual of the exact map", residual(method, schedule), 1e-6)
            yield at_most("flow_map", f"ablation: {name}, {target}: of another Gaussian's", residual(method, schedule, True), 1e-6, must_fail=True)
        for target, velocity in (("eulerian", "data"), ("eulerian", "own"), ("lagrangian", "own"), ("progressive", "data")):
            method, said = FlowMap(target=target, velocity=velocity), f"{name}, {target}, u {velocity}"  # type: ignore[arg-type]
            yield at_most("flow_map", f"{said}: mean gradient at the exact map, standard errors", deviation(method, schedule), 3.0)
            yield at_most("flow_map", f"ablation: {said}: at another Gaussian's", deviation(method, schedule, True), 3.0, must_fail=True)


# -- trained maps -------------------------------------------------------------------------------------------------------


class AffineMap(Denoiser, nn.Module):  # type: ignore[misc]
    """U = a(t, s) x + b(t, s) per dimension, with a small network for a and b: the family in which a Gaussian's map lies."""

    kind: Kind = "flow"

    def __init__(self, schedule: NoiseSchedule, dim: int = 2, width: int = 32) -> None:
        nn.Module.__init__(self)
        self.schedule = schedule
        self.net = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * dim))

    def parameters(self, recurse: bool = True) -> Any:
        return nn.Module.parameters(self, recurse)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.predict(x_t, t, condition).x0

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        t = t.expand(len(x_t))
        s = t if condition is None or condition.end is None else condition.end
        (alpha, sigma), (alpha_s, sigma_s) = self.schedule.coefficients(x_t, t), self.schedule.coefficients(x_t, s)
        levels = [torch.atan2(sigma, alpha).float(), torch.atan2(sigma_s, alpha_s).float()]
        a, b = self.net(torch.cat([f(level) for level in levels for f in (lambda v: v, lambda v: (2 * v).sin(), lambda v: (2 * v).cos())], 1)).chunk(2, 1)
        return Prediction(a * (x_t / (alpha**2 * 0.64 + sigma**2).sqrt()).float() + b, "flow", x_t, t, self.schedule)


def trained(method: FlowMap, schedule: NoiseSchedule, steps: int = 800, batch: int = 256) -> tuple[GaussianMixture, AffineMap]:
    """(teacher, student) after the method's own training on small batches of the Gaussian."""
    torch.manual_seed(0)
    teacher, student = gaussian(schedule, *DATA), AffineMap(schedule)
    roles = Roles(teacher, student)
    if "target" in method.roles:
        roles.target = AffineMap(schedule)
        roles.target.load_state_dict(student.state_dict())

    def draw(step: int) -> Batch:
        return Batch(torch.randn(batch, 2), Condition(), teacher.sample(batch))

    kept = train(method, roles, draw, steps, {"student": 5e-3}, (0.9, 0.99), average=0.99)
    with torch.no_grad():
        for p, average in zip(student.parameters(), kept, strict=True):
            p.copy_(average)
    return teacher, student


@torch.no_grad()
def sampled(student: Denoiser, x: Tensor, steps: int) -> Tensor:
    """Deterministic samples from states at t = 1, in so many even steps."""
    for i in range(steps):
        t, s = (torch.full((len(x),), 1 - k / steps, dtype=torch.float64) for k in (i, i + 1))
        x = jump(student, x, t, s, None)
    return x


@torch.no_grad()
def map_errors(teacher: GaussianMixture, student: Denoiser, steps: Sequence[int] = STEPS) -> list[float]:
    """Relative root-mean-square error of samples against the exact map, by number of steps."""
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)) * teacher.schedule.initial_scale
    one = torch.ones(4000, dtype=torch.float64)
    exact = teacher.flow_map(x, one, 0 * one)
    return [float((sampled(student, x, n) - exact).norm() / exact.norm()) for n in steps]


def distilled(target: str) -> FlowMap:
    """The setting of a small Gaussian teacher's student."""
    return FlowMap(target=target, power=0.5, pairs=PAIRS)  # type: ignore[arg-type]


def map_checks(schedules: Sequence[str] = tuple(SCHEDULES), targets: Sequence[str] = TARGETS) -> Iterator[Check]:
    """Students of the exact teacher reach its map, by every target, under every schedule; more steps only help."""
    for name in schedules:
        for target in targets:
            errors = map_errors(*trained(distilled(target), SCHEDULES[name], STEPS_OF.get(target, 800)))
            yield at_most("flow_map", f"{name}, {target}: error of the trained map, one step", errors[0], 0.02)
            rise = max(b - a for a, b in zip(errors, errors[1:], strict=False))
            yield at_most("flow_map", f"{name}, {target}: largest rise of the error in 1, 2, 4, 8, 16 steps", rise, 0.008)
            yield at_most("flow_map", f"{name}, {target}: error in 16 steps", errors[-1], 0.01)


def data_checks() -> Iterator[Check]:
    """Without a teacher: the law of the data, which on a Gaussian with this coupling is the same map."""
    for target, velocity, bound in (("eulerian", "data", 0.02), ("eulerian", "own", 0.03), ("lagrangian", "own", 0.06), ("progressive", "data", 0.04)):
        method = FlowMap(target=target, velocity=velocity, pairs=PAIRS)  # type: ignore[arg-type]
        errors = map_errors(*trained(method, SCHEDULES["flow"], DATA_STEPS, 512), (1, 16))
        yield at_most("flow_map", f"flow, {target}, u {velocity}: error of the map learnt from samples, one step", errors[0], bound)
        yield at_most("flow_map", f"flow, {target}, u {velocity}: 16 steps", errors[1], 0.012)


# -- what must not be left out ------------------------------------------------------------------------------------------


def without_tangent(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The start moves in time, and the state stays where it is."""
    return derivative(*arguments, **named | {"v_x": None})


derivative: Callable[..., tuple[Tensor, Tensor]] = rule.directional_derivative


def ablation_checks() -> Iterator[Check]:
    name = "ablation: {}: error of the trained map, one step"
    with replaced(rule, "directional_derivative", without_tangent):
        error = map_errors(*trained(distilled("eulerian"), SCHEDULES["flow"]), (1,))[0]
    yield at_most("flow_map", name.format("eulerian without the velocity's tangent"), error, 0.02, must_fail=True)
    for target in ("eulerian", "lagrangian", "progressive"):
        method = FlowMap(target=target, velocity="own", pairs=PAIRS.model_copy(update={"diagonal": 0.0}))  # type: ignore[arg-type]
        error = map_errors(*trained(method, SCHEDULES["flow"]), (1,))[0]
        yield at_most("flow_map", name.format(f"{target}, its own velocity, without the diagonal"), error, 0.02, must_fail=True)


# -- inversion ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def inversion_error(student: Denoiser, steps: int) -> float:
    """‖image → noise → image − image‖ over the images' norm."""
    teacher = gaussian(student.schedule, *DATA)
    torch.manual_seed(3)
    x0 = teacher.sample(2000)
    times = [1 - i / steps for i in range(steps)]
    noise = invert(student, times, x0, None)
    return float((sampled(student, noise * student.schedule.initial_scale, steps) - x0).norm() / x0.norm())


def inversion_checks() -> Iterator[Check]:
    """Up and down again; the student of jumps that lead down only cannot."""
    for name, schedule in SCHEDULES.items():
        exact = ExactFlowMap(gaussian(schedule, *DATA))
        yield at_most("flow_map", f"{name}: image → noise → image by the exact map, 4 steps", inversion_error(exact, 4), 1e-4)
    both = distilled("progressive").model_copy(update={"pairs": PAIRS.model_copy(update={"backward": 0.5})})
    for steps in (1, 4):
        yield at_most("flow_map", f"flow: image → noise → image, trained, {steps} steps", inversion_error(trained(both, SCHEDULES["flow"])[1], steps), 0.03)
    error = inversion_error(trained(distilled("progressive"), SCHEDULES["flow"])[1], 1)
    yield at_most("flow_map", "ablation: trained on jumps down alone, 1 step", error, 0.03, must_fail=True)
