"""One step of consistency distillation against the exact flow map, and what it is told."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distill.analytic import ExactMap, GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition, Prediction
from distill.mapping.pairs import interval_weights
from distill.methods import consistency
from distill.methods.base import Batch
from distill.methods.consistency import Consistency, consistency_function
from distill.roles import Roles
from distill.sampling import renoise_sample
from distill.schedule import EDM, CosineVP, Flow, NoiseSchedule
from distill.verify.core import replaced

SCHEDULES: list[NoiseSchedule] = [CosineVP(), EDM(sigma_min=0.01, sigma_max=10.0), Flow()]
MEAN, STD = (0.5, -0.3), (0.6, 0.9)


def loss_of(method: Consistency, roles: Roles, condition: Condition | None = None, data: GaussianMixture | None = None, count: int = 4000) -> float:
    torch.manual_seed(0)
    x0 = (data or roles.teacher).sample(count).double()  # type: ignore[union-attr]
    batch = Batch(torch.randn(count, 2, dtype=torch.float64), condition or Condition(), x0)
    ((role, loss, _),) = method.step(roles, batch)
    assert role == "student"
    return float(loss)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_the_exact_map_is_the_fixed_point(schedule: NoiseSchedule, solver: str, order: int) -> None:
    """Only the error of one solver step is left of the loss: its RMS falls as N^-(order + 1), to 3e-5 at N = 256. The posterior
    mean in place of the map leaves a hundred times as much."""
    teacher = gaussian(schedule, MEAN, STD)

    def rms(intervals: int) -> float:
        method = Consistency(discretization=(intervals, intervals), solver=solver, metric="l2", target="stop_gradient")  # type: ignore[arg-type]
        return math.sqrt(loss_of(method, Roles(teacher, ExactMap(teacher))))

    fine, coarse = rms(256), rms(128)
    # Heun's first interval falls half an order behind where the slope of the ODE is steep at t = 0.
    assert order + 0.45 <= math.log2(coarse / fine) <= order + 1.1 and fine < 3e-5
    mean = Consistency(discretization=(256, 256), solver=solver, metric="l2", target="stop_gradient")  # type: ignore[arg-type]
    assert fine < 0.01 * math.sqrt(loss_of(mean, Roles(teacher, teacher)))


def test_guidance_is_of_the_ode() -> None:
    """With w on the teacher the fixed point is the map of N(mu_0 + w (mu_c − mu_0), s²), at a fixed scale and at one told."""
    schedule, count = CosineVP(), 4000
    teacher = GaussianMixture(schedule, torch.tensor([[0.4, 0.2], [-0.2, 0.1]]), torch.full((2, 1), 0.8))
    labels = torch.zeros(count, dtype=torch.long)
    condition = Condition({"class_labels": labels}, {"class_labels": labels + 1})
    data = GaussianMixture(schedule, teacher.means[:1], teacher.stds[:1])

    def map_at(w: float) -> ExactMap:
        mean = teacher.means[1] + w * (teacher.means[0] - teacher.means[1])
        return ExactMap(gaussian(schedule, mean.tolist(), (0.8, 0.8)))

    method = Consistency(discretization=(64, 64), solver="heun", metric="l2", target="stop_gradient", guidance_scale=2.5)
    right, off = (loss_of(method, Roles(teacher, map_at(w)), condition, data) for w in (2.5, 1.0))
    assert right < 1e-7 and off > 1e3 * right


class Told(MLPDenoiser):
    """Notes the guidance scales that it is told."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        assert condition is not None and condition.guidance is not None
        self.scales = [*getattr(self, "scales", []), condition.guidance]
        return super().predict(x_t, t, condition, features)


def test_a_scale_per_sample_is_told_to_student_and_target_alike() -> None:
    teacher = GaussianMixture(CosineVP(), torch.tensor([[0.4, 0.2], [-0.2, 0.1]]), torch.full((2, 1), 0.8))
    student, target = Told(teacher.schedule, 2, 16), Told(teacher.schedule, 2, 16)
    labels = torch.zeros(1000, dtype=torch.long)
    batch = Batch(torch.randn(1000, 2), Condition({"class_labels": labels}, {"class_labels": labels + 1}), torch.randn(1000, 2))
    next(iter(Consistency(guidance_range=(2.0, 5.0)).step(Roles(teacher, student, target=target), batch)))
    (w,), (same,) = student.scales, target.scales
    assert torch.equal(w, same) and 2 <= float(w.min()) < 2.1 and 4.9 < float(w.max()) <= 5


def test_boundary_holds_sample_by_sample() -> None:
    network, x = MLPDenoiser(CosineVP(), 2, 16), torch.randn(6, 2)
    t = torch.tensor([0.0, 0.3, 0.0, 1.0, 0.0, 1e-4], dtype=torch.float64)
    out = consistency_function(network, x, t, None)
    assert torch.equal(out[[0, 2, 4]], x[[0, 2, 4]])
    torch.testing.assert_close(out[[1, 3, 5]], network(x, t.clamp_min(network.schedule.t_min))[[1, 3, 5]])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exact_map_samples_the_data_in_any_number_of_steps(steps: int) -> None:
    teacher = gaussian(CosineVP(), MEAN, STD)
    torch.manual_seed(0)
    x = renoise_sample(ExactMap(teacher), Consistency(steps=4).sampler().ladder(steps), torch.randn(100_000, 2), None)
    torch.testing.assert_close(x.mean(0), torch.tensor(MEAN), atol=0.015, rtol=0)
    torch.testing.assert_close(x.std(0), torch.tensor(STD), atol=0, rtol=0.01)


def test_weights_by_hand() -> None:
    """On the flow schedule sigma/alpha at 1/4, 1/2, 3/4 is 1/3, 1, 3, and infinite at 1 (kept at 10,000)."""
    assert interval_weights("uniform", Flow(), 4).tolist() == [1, 1, 1, 1]
    gap = torch.tensor([3.0, 1.5, 0.5, 1 / 9997], dtype=torch.float64)
    torch.testing.assert_close(interval_weights("inverse_gap", Flow(), 4), gap / gap.mean())
    noise = torch.tensor([3**0.5, 1, 3**-0.5, 0.01], dtype=torch.float64)
    torch.testing.assert_close(interval_weights("inverse_noise", Flow(), 4), noise / noise.mean())
    assert float(interval_weights("inverse_noise", Flow(), 1000).max() / interval_weights("inverse_noise", Flow(), 1000)[499]) == pytest.approx(4)


def test_the_weight_of_a_sample_is_that_of_its_interval() -> None:
    teacher = gaussian(CosineVP(), MEAN, STD)
    roles = Roles(teacher, ExactMap(teacher))
    settings: dict[str, Any] = {"discretization": (1, 1), "steps": 1, "target": "stop_gradient", "solver": "data"}
    plain, weighted = (loss_of(Consistency(weighting=w, **settings), roles) for w in ("uniform", "inverse_noise"))  # type: ignore[arg-type]
    assert weighted == pytest.approx(plain) and plain > 0  # one interval has the mean weight
    with replaced(consistency, "interval_weights", lambda w, schedule, n, device: torch.full((n,), 3.0)):
        assert loss_of(Consistency(**settings), roles) == pytest.approx(3 * plain)


def test_targets() -> None:
    assert Consistency(target="stop_gradient").roles == ("student",) and Consistency(target="ema").roles == ("student", "target")


def test_real_data_needs_no_teacher() -> None:
    teacher = gaussian(CosineVP(), MEAN, STD)

    class Untouchable(ExactMap):
        def predict(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("called")

    assert loss_of(Consistency(solver="data", target="stop_gradient"), Roles(Untouchable(teacher), ExactMap(teacher)), data=teacher) > 0


@pytest.mark.parametrize(
    "settings",
    [{"discretization": (10, 5)}, {"discretization": (0, 5)}, {"guidance_range": (5.0, 2.0)}, {"guidance_range": (0.5, 2.0)}, {"steps": 9},
     {"solver": "data", "guidance_scale": 2.0}],
)
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Consistency(**settings)  # type: ignore[arg-type]
