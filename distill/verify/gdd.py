"""An adversary on random features alone: a Gaussian's moments, the classes that it is told, and R1's closed form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.analytic import AffineGenerator, GaussianMixture, gaussian
from distill.denoiser import Condition, Denoiser, Prediction
from distill.losses.adversarial import Discriminator, RandomFeatures, condition_vector
from distill.matching.adversary import GAN, NUDGE, discriminator_loss
from distill.methods.base import Batch
from distill.methods.gdd import GDD
from distill.roles import Roles
from distill.schedule import CosineVP, Kind, NoiseSchedule
from distill.verify.core import Check, at_most, between, train


def checks() -> Iterator[Check]:
    yield from penalty_checks()
    yield from density_checks()
    yield from moment_checks()
    yield from class_checks()


def judge(told: int = 0, width: int = 64) -> Discriminator:
    """Heads on random features of two dimensions."""
    body = RandomFeatures(2, spatial=False)
    shapes = {name: f.shape[1:] for name, f in body(torch.zeros(2, 2), torch.zeros(2)).items()}
    return Discriminator(shapes, width, body, told)


# -- R1 -----------------------------------------------------------------------------------------------------------------


class LinearJudge(nn.Module):
    """l(x_t) = w·x_t, of features (x_t, t)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return next(iter(features.values()))[:, :-1] @ self.weight[:, None]


def penalty(form: str, count: int = 20_000, level: float = 0.3) -> float:
    """What R1 adds to the loss of a linear discriminator, weight 1."""
    teacher = gaussian(CosineVP(), (0.5, -0.3), (0.6, 0.9))
    roles = Roles(teacher, teacher, discriminator=LinearJudge(torch.tensor([3.0, -4.0])))  # type: ignore[arg-type]

    def loss(r1: float) -> float:
        torch.manual_seed(0)
        gan = GAN(features="teacher", layers=["state"], times=(level, level), r1=r1, r1_form=form)  # type: ignore[arg-type]
        x, real = teacher.sample(count), teacher.sample(count)
        return float(discriminator_loss(gan, roles, x, Condition(), real, 0.0)[0].detach())

    return loss(1.0) - loss(0.0)


def penalty_checks() -> Iterator[Check]:
    """For l = w·x_t, |w| = 5: ½|w|² exactly, and (0.1 alpha |w|)² by finite differences of the clean sample."""
    alpha = float(CosineVP().alpha(torch.tensor(0.3, dtype=torch.float64)))
    yield between("gdd", "R1 of a linear discriminator, over ½|w|²", penalty("exact") / 12.5, 1 - 1e-4, 1 + 1e-4)
    by_nudges = penalty("finite_difference") / (NUDGE * alpha * 5) ** 2
    yield between("gdd", "R1 by finite differences, over (0.1 alpha |w|)²", by_nudges, 0.97, 1.03)
    yield between("gdd", "ablation: the one read as the other", penalty("finite_difference") / 12.5, 0.97, 1.03, must_fail=True)


# -- the logit ----------------------------------------------------------------------------------------------------------


def learned(loss: str, apart: float, steps: int = 300) -> tuple[float, float]:
    """(slope of the logit along the first axis, accuracy) of a discriminator between N((a/2, 0), 1) and N((−a/2, 0), 1)."""
    torch.manual_seed(0)
    roles = Roles(gaussian(CosineVP(), (0.0, 0.0), (1.0, 1.0)), AffineGenerator(CosineVP(), (0.0,), (1.0,)), discriminator=judge())
    gan = GAN(features="random", loss=loss, times=(0.0, 0.0))  # type: ignore[arg-type]
    assert roles.discriminator is not None
    optimizer, shift, accuracies = torch.optim.Adam(roles.parameters("discriminator"), 3e-3), torch.tensor([apart / 2, 0.0]), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        value, accuracy = discriminator_loss(gan, roles, torch.randn(512, 2) - shift, Condition(), torch.randn(512, 2) + shift, 0.0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        accuracies.append(float(accuracy))
    with torch.no_grad():
        x = torch.stack([torch.linspace(-1.2, 1.2, 41), torch.zeros(41)], 1)
        logit = roles.discriminator.of_samples(x, torch.zeros(41, dtype=torch.float64)).mean(1)
    slope = float((logit * x[:, 0]).sum() / x[:, 0].square().sum())
    return slope, sum(accuracies[-50:]) / 50


def density_checks() -> Iterator[Check]:
    """Logistic logits are log p/q = a·x between Gaussians a apart; hinge logits are not; nothing tells equal laws apart."""
    slope, accuracy = learned("logistic", 1.0)
    yield between("gdd", "logistic: slope of the logit between Gaussians one apart", slope, 0.88, 1.12)
    yield between("gdd", "accuracy between them (Bayes: 0.691)", accuracy, 0.67, 0.72)
    yield between("gdd", "ablation: the slope of hinge logits", learned("hinge", 1.0)[0], 0.88, 1.12, must_fail=True)
    yield between("gdd", "accuracy between equal laws", learned("logistic", 0.0, 100)[1], 0.47, 0.53)


# -- training -----------------------------------------------------------------------------------------------------------


def moments(rate: float, steps: int = 500) -> float:
    """Largest error of an affine student's moments, over the teacher's: the adversary alone."""
    torch.manual_seed(0)
    teacher = gaussian(CosineVP(), (0.5, -0.8), (0.6, 0.9))
    student = AffineGenerator(teacher.schedule, (0.0, 0.0), (1.0, 0.5))
    rates = {"student": 0.01, "discriminator": rate}
    kept = train(
        GDD(), Roles(teacher, student, discriminator=judge()), lambda step: Batch(torch.randn(256, 2), Condition(), teacher.sample(256)), steps, rates,
        betas=(0.0, 0.99), average=0.98,
    )
    return float(torch.cat([kept[0] / teacher.means[0] - 1, kept[1] / teacher.stds[0] - 1]).abs().max())


def moment_checks() -> Iterator[Check]:
    yield at_most("gdd", "adversary alone: relative error of a Gaussian's moments", moments(3e-3), 0.05)
    yield at_most("gdd", "ablation: a discriminator that does not learn", moments(0.0, 100), 0.05, must_fail=True)


class ClassGenerator(Denoiser):
    """x = m_c + 0.3 z: a mean of its own for each of two classes, the wrong one to begin with."""

    kind: Kind = "x0"

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.means = nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))

    def parameters(self) -> list[nn.Parameter]:
        return [self.means]

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: object = ()) -> Prediction:
        assert condition is not None
        labels = condition.values["class_labels"]
        assert isinstance(labels, Tensor)
        return Prediction(self.means[labels] + 0.3 * x_t, "x0", x_t, t.expand(len(x_t)), self.schedule)


def class_error(conditional: bool, steps: int = 300) -> float:
    """Distance of the classes' means from where they belong; they start 2 away, exchanged."""
    torch.manual_seed(0)
    schedule = CosineVP()
    teacher = GaussianMixture(schedule, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.full((2, 2), 0.3))
    labels = torch.arange(256) % 2
    condition, student = Condition({"class_labels": labels}), ClassGenerator(schedule)
    told = condition_vector(condition.values, 256, labels.device).shape[1]
    method = GDD(gan=GAN(weight=1.0, features="random", times=(0.0, 0.0), conditional=conditional))

    def draw(step: int) -> Batch:
        return Batch(torch.randn(256, 2), condition, (teacher.means[labels] + 0.3 * torch.randn(256, 2)).float())

    train(method, Roles(teacher, student, discriminator=judge(told)), draw, steps, {"student": 0.02, "discriminator": 3e-3}, betas=(0.0, 0.99))
    return float((student.means.detach() - teacher.means).norm(dim=1).max())


def class_checks() -> Iterator[Check]:
    """Classes that are exchanged: a discriminator that is told the class puts them right; one that is not has nothing to say."""
    yield at_most("gdd", "exchanged classes: error of their means (2 at the start)", class_error(True), 0.2)
    yield at_most("gdd", "ablation: a discriminator that is not told the class", class_error(False, 100), 0.2, must_fail=True)


