"""The exact teachers are exact: checked against autograd and sampling, so that all else may be checked against them."""

import pytest
import torch

from distill.analytic import AffineGenerator, ExactCritic, ExactRatio, GaussianMixture, gaussian, ring
from distill.denoiser import Condition
from distill.guidance import Guided
from distill.schedule import EDM, CosineVP, Flow

SCHEDULES = [CosineVP(), EDM(sigma_max=20.0), Flow()]


def mixture(schedule: object) -> GaussianMixture:
    return GaussianMixture(schedule, torch.tensor([[-1.0, 0.5], [2.0, -1.0]]), torch.tensor([[0.5, 0.9], [0.3, 0.4]]), torch.tensor([0.3, 0.7]))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_score_is_the_gradient_of_the_log_density(schedule: object) -> None:
    teacher = mixture(schedule)
    x = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.2, 0.95, 50, dtype=torch.float64)
    (score,) = torch.autograd.grad(teacher.log_density(x, t).sum(), x)
    torch.testing.assert_close(teacher.predict(x, t).score.detach(), score, rtol=1e-8, atol=1e-8)


def test_density_integrates_to_one() -> None:
    teacher = GaussianMixture(CosineVP(), torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.5], [0.3]]))
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    for t in (0.01, 0.4, 1.0):
        density = teacher.log_density(x, torch.tensor(t, dtype=torch.float64)).exp()
        assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flow_map_solves_the_ode(schedule: object) -> None:
    """d/dt X = velocity along the map, and the map composes."""
    teacher = gaussian(schedule, (0.5, -0.3), (0.6, 0.9))  # type: ignore[arg-type]
    x = torch.randn(20, 2, dtype=torch.float64)

    def at(t: float) -> torch.Tensor:
        return torch.full((20,), t, dtype=torch.float64)

    h = 1e-6
    slope = (teacher.flow_map(x, at(0.7), at(0.5 + h)) - teacher.flow_map(x, at(0.7), at(0.5 - h))) / (2 * h)
    there = teacher.flow_map(x, at(0.7), at(0.5))
    torch.testing.assert_close(slope, teacher.predict(there, at(0.5)).velocity, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(teacher.flow_map(there, at(0.5), at(0.2)), teacher.flow_map(x, at(0.7), at(0.2)), rtol=1e-9, atol=1e-9)


def test_samples_have_the_stated_moments() -> None:
    torch.manual_seed(0)
    teacher = mixture(CosineVP())
    x = teacher.sample(200_000).double()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)[:, None]
    mean = (weights * teacher.means).sum(0)
    variance = (weights * (teacher.stds**2 + teacher.means**2)).sum(0) - mean**2
    torch.testing.assert_close(x.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(x.var(0), variance, rtol=0.02, atol=0)


def test_class_conditions_choose_components_and_guidance_extrapolates() -> None:
    """Guided Gaussian: with equal variances the w-guided denoiser is that of N(mu_0 + w (mu_c − mu_0), s²)."""
    schedule = CosineVP()
    teacher = GaussianMixture(schedule, torch.tensor([[0.6, 0.2], [-0.2, 0.1]]), torch.full((2, 1), 0.5))
    labels = torch.zeros(30, dtype=torch.long)
    condition = Condition({"class_labels": labels}, {"class_labels": labels + 1})
    x, t = torch.randn(30, 2), torch.full((30,), 0.6, dtype=torch.float64)
    tilted = gaussian(schedule, (-0.2 + 2.5 * 0.8, 0.1 + 2.5 * 0.1), (0.5, 0.5))
    torch.testing.assert_close(Guided(teacher, 2.5)(x, t, condition), tilted(x, t), atol=1e-5, rtol=1e-5)
    whole = Condition({"class_labels": labels + 2}, {"class_labels": labels + 2})
    torch.testing.assert_close(teacher(x, t, whole), teacher(x, t))


def test_critic_and_ratio_follow_the_generator() -> None:
    schedule = CosineVP()
    generator, teacher = AffineGenerator(schedule, (0.3,), (0.8,)), gaussian(schedule, (0.0,), (1.0,))
    x, t = torch.randn(10, 1), torch.full((10,), 0.5, dtype=torch.float64)
    critic, ratio = ExactCritic(generator), ExactRatio(teacher, generator)
    features = critic.predict(x, t, None, ("state",)).features
    assert (ratio(features).detach() - (teacher.log_density(x, t) - gaussian(schedule, (0.3,), (0.8,)).log_density(x, t))).abs().max() < 1e-5
    with torch.no_grad():
        generator.mean.fill_(0.0)
        generator.std.fill_(1.0)
    torch.testing.assert_close(critic(x, t), teacher(x, t))
    assert ratio(features).abs().max() < 1e-6


def test_ring_is_a_ring() -> None:
    teacher = ring(CosineVP(), modes=8, radius=2.0)
    torch.testing.assert_close(teacher.means.norm(dim=1), torch.full((8,), 2.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="single Gaussian"):
        teacher.flow_map(torch.zeros(1, 2), torch.tensor(0.5), torch.tensor(0.1))
