"""What ``distill verify`` checks of flow maps, MeanFlow, shortcut models and CTM; and the coordinates in which they are one engine."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distill.analytic import ExactFlowMap, TwoTimeMLP, gaussian, ring
from distill.denoiser import Condition
from distill.flow import average_velocity, clock, jump
from distill.matching.time_pairs import TimePairs
from distill.methods.base import Batch
from distill.methods.flow_map import FlowMap
from distill.methods.mean_flow import MeanFlow
from distill.methods.shortcut import Shortcut
from distill.roles import Roles
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify import ctm, flow_map, mean_flow, shortcut
from distill.verify.core import replaced, train
from distill.verify.dmd2 import ring_scores

X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0.9, 1.0, 0.5, 0.3, 0.7], dtype=torch.float64)
S = torch.tensor([0.1, 0.0, 0.5, 0.7, 0.69], dtype=torch.float64)  #: down, to data, nowhere, up, and a little


@pytest.mark.parametrize("schedule", [CosineVP(), EDM(), Flow()])
def test_coordinates(schedule: NoiseSchedule) -> None:
    """The exact map in U is the exact map; a jump is DDIM's interpolation; nowhere is the identity to the bit, for any weights."""
    teacher = gaussian(schedule, *flow_map.DATA)
    exact = ExactFlowMap(teacher)
    torch.testing.assert_close(jump(exact, X, T, S, None), teacher.flow_map(X, T, S))
    torch.testing.assert_close(exact(X, T), teacher(X, T))
    torch.testing.assert_close(exact.predict(X, T).velocity, teacher.predict(X, T).velocity)
    torch.manual_seed(0)
    student, x = TwoTimeMLP(schedule, 2), X.float()
    torch.testing.assert_close(jump(student, x, T, S, None), schedule.ddim(x, student(x, T, Condition(end=S)), T, S), rtol=1e-4, atol=1e-4)
    assert torch.equal(jump(student, x, T, T, None), x)
    tau, _, slope = clock(schedule, T)
    h = 1e-6
    torch.testing.assert_close(slope, (clock(schedule, T + h)[0] - clock(schedule, T - h)[0]) / (2 * h), rtol=1e-6, atol=1e-9)
    if isinstance(schedule, Flow):  # MeanFlow's own form
        torch.testing.assert_close(jump(exact, X, T, S, None), X + (S - T)[:, None] * average_velocity(exact, X, T, S, None))
        assert torch.equal(tau, T)


def test_residuals() -> None:
    checks = list(flow_map.residual_checks())
    assert len(checks) == 48 and all(c.passed for c in checks), [c.name for c in checks if not c.passed]


@pytest.mark.parametrize(("schedule", "target"), [("VP", "eulerian"), ("flow", "progressive")])
def test_trained_maps(schedule: str, target: str) -> None:
    checks = list(flow_map.map_checks([schedule], [target]))
    assert all(c.passed for c in checks), [(c.name, c.value) for c in checks]


def test_without_the_velocitys_tangent() -> None:
    with replaced(flow_map.rule, "directional_derivative", flow_map.without_tangent):
        assert flow_map.map_errors(*flow_map.trained(flow_map.distilled("eulerian"), Flow()), (1,))[0] > 0.05


@pytest.mark.slow
def test_in_full() -> None:
    failed = [(c.name, c.value) for module in (flow_map, mean_flow, shortcut, ctm) for c in module.checks() if not c.passed]
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize(("target", "power"), [("eulerian", 0.5), ("progressive", 0.0)])
def test_eight_modes(target: Any, power: float) -> None:
    """Sliced-Wasserstein distance to the teacher in teacher–teacher distances: 1.5 in one step, 1.2 in four."""
    torch.manual_seed(0)
    teacher = ring(CosineVP(), std=0.3)
    student = TwoTimeMLP(teacher.schedule, 2, 96, 1.4)
    method = FlowMap(target=target, power=power, pairs=TimePairs(to_data=0.3, from_noise=0.3, diagonal=0.3 if power else 0.4))

    def draw(step: int) -> Batch:
        return Batch(torch.randn(512, 2), Condition(), teacher.sample(512))

    kept = train(method, Roles(teacher, student), draw, 2000, {"student": 3e-3}, (0.9, 0.99), average=0.99)
    with torch.no_grad():
        for p, average in zip(student.parameters(), kept, strict=True):
            p.copy_(average)
    torch.manual_seed(5)
    z = torch.randn(8000, 2)
    for steps, bound in ((1, 1.5), (4, 1.25)):
        error, distance = ring_scores(teacher, flow_map.sampled(student, z, steps))
        assert distance <= bound and error <= 0.2, (steps, error, distance)


def drawn(progress: float = 0.0, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return TimePairs(**settings).draw(torch.empty(4000, 2), Flow(), progress)


def test_pairs_of_times() -> None:
    t, s = drawn(diagonal=0.25)
    assert torch.equal(t[:1000], s[:1000]) and bool((t[1000:] > s[1000:]).all())
    assert float(t[1000:].mean()) == pytest.approx(2 / 3, abs=0.02) and float(s[1000:].mean()) == pytest.approx(1 / 3, abs=0.02)  # sorted uniform draws
    t, s = drawn(diagonal=0.0, to_data=0.3, from_noise=0.5)
    assert float((s == 0).double().mean()) == pytest.approx(0.3, abs=0.03) and float(((t == 1) & (s == 0)).double().mean()) == pytest.approx(0.15, abs=0.02)
    t, s = drawn(diagonal=0.0, interval=0.2, to_data=0.5)
    assert float((t - s).max()) == pytest.approx(0.2) and bool((t >= s).all())
    t, s = drawn(0.25, diagonal=0.0, grow=0.5)
    assert float((t - s).max()) == pytest.approx(0.5) and drawn(0.75, diagonal=0.0, grow=0.5)[1].min() < 0.05
    t, s = drawn(diagonal=0.0, backward=0.4)
    assert float((t < s).double().mean()) == pytest.approx(0.4, abs=0.03)
    t, s = drawn(diagonal=0.0, times=(0.0, 0.8), powers_of_two=8)
    lengths, counts = (0.8 / (t - s)).round().unique(return_counts=True)
    assert lengths.tolist() == [1.0, 2.0, 4.0] and counts.min() > 1300 and torch.allclose(t / (t - s), (t / (t - s)).round())
    assert float(drawn(diagonal=1.0)[0].min()) >= 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3}, "multiple"), ({"pairs": {"interval": 0.2}}, "set more steps"), ({"compare": "data"}, "network: ema"),
        ({"target": "teacher_step", "pairs": {"backward": 0.5}}, "only leads down"), ({"velocity": "own", "power": 0.5}, "set power: 0"),
        ({"gan": {"features": "critic"}}, "no critic"), ({"pairs": {"powers_of_two": 6}}, "2, 4, 8"),
        ({"pairs": {"powers_of_two": 8, "grow": 0.5}}, "fixes the jumps"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FlowMap(**settings)


def test_samplers_are_even_grids() -> None:
    sampler = FlowMap(pairs=TimePairs(times=(0.0, 0.8)), steps=2, most_steps=4).sampler()
    assert sampler.times == pytest.approx((0.8, 0.6, 0.4, 0.2)) and sampler.ladder(2) == pytest.approx((0.8, 0.4)) and sampler.end_time and sampler.gamma == 0
    with pytest.raises(ValidationError, match="powers of two"):
        Shortcut(steps=4, most_steps=12)


def test_guidance_without_a_teacher_is_the_guided_field() -> None:
    """On classes of equal variance the field that MeanFlow regresses on with w has the w-guided Gaussian's velocity as its mean (the guide's GC)."""
    schedule, w, n = Flow(), 2.5, 400_000
    means, std = torch.tensor([[0.4, 0.2], [-0.2, 0.1]]), 0.8
    exact = {0: gaussian(schedule, means[0].tolist(), [std] * 2), 1: gaussian(schedule, means[1].tolist(), [std] * 2)}
    student = ExactFlowMap(exact[1])  # whatever it is told it is the null condition's
    labels = torch.zeros(n, dtype=torch.long)
    method = MeanFlow(guidance_scale=w, null=0.0)
    torch.manual_seed(0)
    batch = Batch(torch.randn(n, 2), Condition({"class_labels": labels}, {"class_labels": labels + 1}), exact[0].sample(n))
    t = torch.full((n,), 0.6, dtype=torch.float64)
    x_t = schedule.add_noise(batch.x0, batch.noise, t)  # type: ignore[arg-type]
    with torch.no_grad():
        u = method._velocity(Roles(exact[0], student), student, batch, x_t, t, batch.condition)
    guided = gaussian(schedule, (means[1] + w * (means[0] - means[1])).tolist(), [std] * 2).predict(x_t, t).as_kind("flow")
    error = (u - guided).mean(0) / ((u - guided).std(0) / math.sqrt(n))
    assert float(error.abs().max()) < 4
    slope = ((u - guided) * (x_t - x_t.mean(0))).mean(0)
    assert float(slope.abs().max()) < 0.01
