"""What ``distill verify consistency`` checks: the finite-grid optimum, the boundary, the map, and guidance."""

import pytest
import torch

from distill.analytic import gaussian
from distill.mapping.solvers import solver_step
from distill.methods.consistency import Consistency
from distill.schedule import EDM, CosineVP, Flow
from distill.verify import consistency


@pytest.mark.parametrize(("solver", "intervals", "expected"), [("ddim", 8, 0.707), ("heun", 8, 1.264), ("ddim", 64, 0.958), ("heun", 64, 1.0034)])
def test_finite_grid_optimum(solver: str, intervals: int, expected: float) -> None:
    """The guide's table for VE, s = 0.6, Karras' grid: a perfect linear student is off by exactly this much."""
    assert consistency.finite_grid_ratio(intervals, solver) == pytest.approx(expected, rel=2e-3)


def test_boundary() -> None:
    assert all(c.passed for c in consistency.boundary_checks())


def test_trained_map() -> None:
    teacher, student = consistency.trained_map(Flow(), steps=1500)
    assert consistency.map_error(teacher, student) <= 0.03
    assert consistency.map_error(teacher, teacher) > 0.5  # the posterior mean is not the map


@pytest.mark.slow
def test_trained_maps_and_guidance_in_full() -> None:
    assert all(c.passed for checks in (consistency.map_checks, consistency.guidance_checks) for c in checks())


@pytest.mark.parametrize("schedule", [CosineVP(), EDM(sigma_max=20.0), Flow()])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_solvers_have_their_order(schedule: object, solver: str, order: int) -> None:
    """Halving the step divides the error of a whole trajectory by 2^order, against the exact flow map."""
    teacher = gaussian(schedule, (0.5, -0.3), (0.6, 0.9))  # type: ignore[arg-type]
    torch.manual_seed(0)
    start = torch.randn(64, 2, dtype=torch.float64)
    high, low = 0.8, 0.3

    def error(steps: int) -> float:
        times = torch.linspace(high, low, steps + 1, dtype=torch.float64)
        x = start
        for t, s in zip(times[:-1], times[1:], strict=True):
            x = solver_step(teacher, x, t.expand(64), s.expand(64), None, solver)  # type: ignore[arg-type]
        return float((x - teacher.flow_map(start, times[0].expand(64), times[-1].expand(64))).norm())

    ratio = error(32) / error(64)
    assert ratio == pytest.approx(2**order, rel=0.12)


def test_discretization_doubles() -> None:
    method = Consistency(discretization=(10, 1280), steps=1)
    seen = [method.intervals(p / 1000) for p in range(1000)]
    assert sorted(set(seen)) == [10, 20, 40, 80, 160, 320, 640, 1280] and seen == sorted(seen)
    assert method.intervals(0.124) == 10 and method.intervals(0.126) == 20
    assert Consistency(discretization=(50, 50)).intervals(0.9) == 50
