"""The terms of DMD2's losses one by one: whose gradient goes where, and how strong it is."""

import pytest
import torch

from distill.analytic import AffineGenerator, ExactCritic, ExactRatio, GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.losses.divergence import DIVERGENCES
from distill.matching.adversary import GAN
from distill.matching.rollout import roll_out
from distill.methods.base import Batch
from distill.methods.dmd2 import DMD2
from distill.roles import Roles
from distill.schedule import CosineVP

SCHEDULE = CosineVP()


def toy(method: DMD2) -> tuple[Roles, Batch, GaussianMixture]:
    torch.manual_seed(0)
    teacher = gaussian(SCHEDULE, (0.5, -0.3), (0.6, 0.9))
    teacher.means.requires_grad_()
    student, critic = MLPDenoiser(SCHEDULE, 2, 32), MLPDenoiser(SCHEDULE, 2, 32)
    roles = Roles(teacher, student, critic, discriminator=Discriminator({"state": (3,)}, 16), state=method.initial_state())
    return roles, Batch(torch.randn(128, 2), Condition(), teacher.sample(128).detach()), teacher


@pytest.mark.parametrize("features", ["critic", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_stay_with_their_roles(divergence: str, features: str) -> None:
    """The teacher gets none from any loss; the student none from those of critic and discriminator; the critic is not
    differentiated through by the score term."""
    method = DMD2(divergence=divergence, critic_steps=2, steps=2, gan=GAN(layers=["state"], features=features, r1=0.1))  # type: ignore[arg-type]
    roles, batch, teacher = toy(method)
    student, critic = roles.parameters("student"), roles.parameters("critic")
    for names, loss, _ in method.step(roles, batch):
        own = student if names == "student" else [p for n in ((names,) if isinstance(names, str) else names) for p in roles.parameters(n)]
        gradients = torch.autograd.grad(loss, [*own, teacher.means, *([] if names == "student" else student)], allow_unused=True, retain_graph=True)
        assert all(g is not None and g.any() for g in gradients[: len(own)]), names
        assert all(g is None for g in gradients[len(own) :]), names
        if names == "student":
            assert all(g is None for g in torch.autograd.grad(loss, critic, allow_unused=True))


def test_the_gan_pulls_from_the_teacher_to_the_data_in_proportion_to_its_weight() -> None:
    """Student = teacher, data elsewhere: the score term is silent, and the mean's gradient points at the data."""
    teacher, data = gaussian(SCHEDULE, (0.0,), (1.0,)), gaussian(SCHEDULE, (1.0,), (1.0,))
    generator = AffineGenerator(SCHEDULE, (0.0,), (1.0,))
    roles = Roles(teacher, generator, ExactCritic(generator), discriminator=ExactRatio(data, generator))  # type: ignore[arg-type]

    def pull(weight: float | None) -> float:
        torch.manual_seed(0)
        gan = None if weight is None else GAN(weight=weight, features="teacher", layers=["state"])
        batch = Batch(torch.randn(2000, 1, dtype=torch.float64), Condition(), data.sample(2000).double())
        _, loss, _ = next(iter(DMD2(gan=gan).step(roles, batch)))
        (gradient,) = torch.autograd.grad(loss, generator.mean)
        return -float(gradient)

    assert pull(None) == pytest.approx(0, abs=1e-12)
    weak, strong = pull(0.1), pull(0.4)
    assert weak > 0.01 and strong == pytest.approx(4 * weak, rel=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_normalised_weights_keep_reverse_kls_strength(divergence: str) -> None:
    """f-distill's second stage: the mean of the injected gradient's weights is that of h = 1."""
    base = DMD2(weighting="exact", score_times=(0.3, 0.9))
    other = base.model_copy(update={"divergence": divergence, "gan": GAN(weight=1e-30, features="teacher", layers=["state"]), "ratio_decay": 0.0})
    generator = AffineGenerator(SCHEDULE, (-0.9,), (0.8,))
    teacher = gaussian(SCHEDULE, (0.0,), (1.0,))
    ratio = ExactRatio(teacher, generator)
    roles = Roles(teacher, generator, ExactCritic(generator), discriminator=ratio, state=other.initial_state())  # type: ignore[arg-type]
    batch = Batch(torch.randn(5000, 1), Condition(), teacher.sample(5000))
    injected = []
    for method in (base, other):
        torch.manual_seed(0)
        sample = roll_out(generator, "backward_simulation", (1.0,), batch.noise, batch.condition)
        (gradient,) = torch.autograd.grad(method._score_loss(roles, batch, sample)[0], sample.x)
        injected.append(gradient.flatten())
    h = injected[1] / injected[0]
    assert float(h.mean()) == pytest.approx(1, abs=1e-4) and float(h.std()) > 0.05


def test_the_r1_term_is_zero_for_a_judge_that_does_not_look() -> None:
    class Blind(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.logit.expand(len(next(iter(features.values()))), 1)

    losses = []
    for r1 in (0.0, 100.0):
        method = DMD2(critic_steps=1, gan=GAN(features="teacher", layers=["state"], r1=r1))
        roles, batch, _ = toy(method)
        roles.discriminator = Blind()  # type: ignore[assignment]
        losses.append(float([loss for names, loss, _ in method.step(roles, batch) if names == "discriminator"][0].detach()))
    assert losses[0] == pytest.approx(losses[1]) and losses[0] > 2 * 0.69


@pytest.mark.parametrize("settings", [{"steps": 2, "times": [0.5, 1.0]}, {"steps": 2, "times": [1.0]}, {"steps": 9}, {"divergence": "kl"}, {"critic_steps": 0}])
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        DMD2(**settings)  # type: ignore[arg-type]
