"""What the methods do step by step: who is called where, what is zero when, and what the trainer is handed."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import perturb, tiny_unet2d

from distill.analytic import AffineGenerator, ExactCritic, GaussianMixture, MLPDenoiser, gaussian
from distill.denoiser import BackboneDenoiser, Condition, Denoiser, Prediction
from distill.losses.adversarial import Discriminator
from distill.matching.adversary import GAN
from distill.matching.critic import denoising_loss
from distill.matching.objectives import injected
from distill.matching.times import draw_times
from distill.methods import available, find_method
from distill.methods.base import Batch, Method
from distill.methods.consistency import Consistency
from distill.methods.dmd2 import DMD2
from distill.roles import LoRA, Roles, build_roles
from distill.sampling import Sampler, renoise_sample, uniform_ladder
from distill.schedule import CosineVP
from distill.teacher import Teacher


def test_methods_are_found_by_name_and_by_path() -> None:
    assert {"dmd2", "consistency"} <= available().keys()
    assert find_method("distill.methods.dmd2:DMD2") is DMD2
    with pytest.raises(KeyError, match="not a subclass"):
        find_method("distill.matching.adversary:GAN")
    with pytest.raises(KeyError):
        find_method("nowhere:Method")


def test_settings_are_strict() -> None:
    with pytest.raises(ValidationError, match="density ratio"):
        DMD2(divergence="neyman")
    with pytest.raises(ValidationError):
        DMD2(critic_steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="fewer than the student's"):
        Consistency(steps=8, discretization=(4, 4))
    assert isinstance(DMD2(), Method) and DMD2().sampler() == Sampler((1.0,), 1, 1.0)


def test_injected_gradient() -> None:
    x, g = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(injected(x, g), x)
    torch.testing.assert_close(gradient, g / 12)


def test_times_are_uniform_and_stratified() -> None:
    torch.manual_seed(0)
    t = draw_times((0.2, 0.7), torch.empty(100), CosineVP())
    assert t.dtype == torch.float64 and torch.equal(((t - 0.2) / 0.5 * 100).floor().sort().values, torch.arange(100.0, dtype=torch.float64))
    assert not torch.equal(t, t.sort().values)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=2)])
def test_a_critic_that_equals_the_teacher_moves_nothing(lora: LoRA | None) -> None:
    """At the start of a run without guidance the score term is exactly zero: student and critic are the teacher."""
    teacher = Teacher(tiny_unet2d())
    roles, _ = build_roles(teacher, ["student", "critic"], lora)
    batch = Batch(torch.randn(6, 1, 8, 8), teacher.condition(list(range(6))))
    _, loss, logs = next(iter(DMD2().step(roles, batch)))
    assert float(loss.detach()) == 0 and float(logs["score_gap"]) == 0
    _, loss, logs = next(iter(DMD2(guidance_scale=3.0).step(roles, batch)))
    assert float(logs["score_gap"]) > 1e-3  # the teacher is guided, the critic is not
    assert roles.critic is not None
    perturb(roles.critic.parameters())
    assert float(next(iter(DMD2().step(roles, batch)))[2]["score_gap"]) > 1e-3


def test_the_normaliser_takes_the_scale_out() -> None:
    """Rescaling data, student, teacher and critic by k leaves the injected gradient as it was (the guide's check)."""

    class Says(Denoiser):
        schedule, kind = CosineVP(), "x0"

        def __init__(self, value: float) -> None:
            self.value = value

        def predict(self, x_t: Any, t: Any, condition: Any = None, features: Any = ()) -> Prediction:
            return Prediction(torch.full_like(x_t, self.value), "x0", x_t, t, self.schedule)

    def gap(k: float) -> float:
        torch.manual_seed(0)
        roles = Roles(Says(0.5 * k), AffineGenerator(CosineVP(), (2.0 * k,), (0.1 * k,)), Says(0.8 * k))
        return float(next(iter(DMD2().step(roles, Batch(torch.randn(2000, 1), Condition()))))[2]["score_gap"])

    assert gap(3.0) == pytest.approx(gap(1.0), rel=1e-5) and gap(1.0) == pytest.approx(0.3 / 1.5, rel=0.02)


class Watched(AffineGenerator):
    """Notes where it is called and whether a graph is kept."""

    def __init__(self) -> None:
        super().__init__(CosineVP(), (0.3,), (0.7,))
        self.calls: list[tuple[float, bool, torch.Tensor]] = []

    def predict(self, x_t: Any, t: Any, condition: Any = None, features: Any = ()) -> Any:
        self.calls.append((float(t.reshape(-1)[0]), torch.is_grad_enabled(), x_t.detach()))
        return super().predict(x_t, t, condition, features)


def test_backward_simulation_visits_what_inference_visits() -> None:
    """A multi-step student is trained on its own intermediate samples: every evaluation is at a prefix of the ladder, only
    the last one has a gradient, and the inputs have the moments of inference, not those of noised data."""
    student = Watched()
    teacher = gaussian(student.schedule, (-2.0,), (0.2,))
    roles = Roles(teacher, student, ExactCritic(student))
    method = DMD2(steps=4, critic_steps=1)
    torch.manual_seed(0)
    lengths, inputs = set(), []
    for _ in range(40):
        student.calls.clear()
        next(iter(method.step(roles, Batch(torch.randn(500, 1), Condition()))))
        times = [t for t, _, _ in student.calls]
        assert times == list(uniform_ladder(4))[: len(times)]
        assert [grad for _, grad, _ in student.calls] == [False] * (len(times) - 1) + [True]
        lengths.add(len(times))
        if len(times) == 3:
            inputs.append(student.calls[-1][2])
    assert lengths == {1, 2, 3, 4}
    mean, variance = 0.0, 1.0  # of the input, from the noise on: x0 = 0.3 + 0.7 x_t, re-noised to the next time
    for t in (0.75, 0.5):
        alpha, sigma = (float(c) for c in student.schedule.alpha_sigma(torch.tensor(t)))
        mean, variance = alpha * (0.3 + 0.7 * mean), alpha**2 * 0.49 * variance + sigma**2
    x = torch.cat(inputs)
    assert float(x.mean()) == pytest.approx(mean, abs=0.03)  # noised data would give −2 alpha
    assert float(x.std()) == pytest.approx(variance**0.5, rel=0.03)


def test_update_order_and_roles() -> None:
    teacher = Teacher(tiny_unet2d())
    roles, _ = build_roles(teacher, ["student", "critic"])
    batch = Batch(torch.randn(4, 1, 8, 8), teacher.condition([0, 1, 2, 3]), torch.rand(4, 1, 8, 8))
    assert [names for names, _, _ in DMD2(critic_steps=3).step(roles, batch)] == ["student", "critic", "critic", "critic"]
    roles.discriminator = Discriminator({"mid_block": (16, 4, 4)})
    on_critic, on_teacher = DMD2(critic_steps=1, gan=GAN()), DMD2(critic_steps=1, gan=GAN(features="teacher", r1=0.1))
    assert [names for names, _, _ in on_critic.step(roles, batch)] == ["student", ("critic", "discriminator")]
    assert [names for names, _, _ in on_teacher.step(roles, batch)] == ["student", "critic", "discriminator"]
    for names, loss, _ in on_teacher.step(roles, batch):
        if names == "student":  # the GAN's gradient reaches the student through the frozen teacher
            assert all(g is not None for g in torch.autograd.grad(loss, roles.parameters("student"), allow_unused=True))


def test_features_end_the_forward_early() -> None:
    teacher = Teacher(tiny_unet2d())
    assert isinstance(teacher.denoiser, BackboneDenoiser)
    reached: list[str] = []
    for name in ("mid_block", "up_blocks.0", "conv_out"):
        teacher.backbone.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: reached.append(name))
    condition, x, t = teacher.condition([1, 2]), torch.randn(2, 1, 8, 8), torch.tensor(0.5)
    reached.clear()
    early = teacher.denoiser.features(x, t, condition, ("down_blocks.0.resnets.0", "mid_block"))
    assert reached == ["mid_block"]
    whole = teacher.denoiser.predict(x, t, condition, ("down_blocks.0.resnets.0", "mid_block")).features
    assert reached[1:] == ["mid_block", "up_blocks.0", "conv_out"] and all(torch.equal(early[k], whole[k]) for k in whole)


def test_the_critics_optimum_is_the_denoiser_of_the_samples() -> None:
    """Denoising score matching: the loss is least at the exact denoiser, above it by the squared difference."""
    torch.manual_seed(0)
    schedule = CosineVP()
    law = gaussian(schedule, (0.4, -0.1), (0.5, 0.8))
    x0, t = law.sample(20_000), draw_times((0.2, 0.9), torch.empty(20_000), CosineVP())
    losses = []
    for shift in (0.0, 0.2):
        other = GaussianMixture(schedule, law.means + shift, law.stds)
        torch.manual_seed(1)
        losses.append(float(denoising_loss(other, x0, t, None)))
    assert losses[1] > losses[0] + 1e-3


def test_consistency_trains_the_student_alone() -> None:
    schedule = CosineVP()
    torch.manual_seed(0)
    student, target = MLPDenoiser(schedule, 2, 16), MLPDenoiser(schedule, 2, 16)
    teacher = gaussian(schedule, (0.0, 0.0), (1.0, 1.0))
    roles = Roles(teacher, student, target=target)
    (update,) = Consistency(discretization=(4, 4)).step(roles, Batch(torch.randn(16, 2), Condition(), teacher.sample(16)))
    assert update[0] == "student"
    assert all(g is None for g in torch.autograd.grad(update[1], list(target.parameters()), allow_unused=True, retain_graph=True))
    assert any(g.any() for g in torch.autograd.grad(update[1], list(student.parameters())))


def test_sampling_follows_the_ladder() -> None:
    student = Watched()
    sampler = Sampler(uniform_ladder(8), 8)
    assert sampler.ladder(4) == (1.0, 0.75, 0.5, 0.25) and sampler.ladder(1) == (1.0,) and sampler.ladder(3) == (1.0, 0.75, 0.375)
    a, b = (renoise_sample(student, sampler.ladder(4), torch.ones(3, 1), None, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b) and [t for t, _, _ in student.calls[:4]] == [1.0, 0.75, 0.5, 0.25]
    from distill.errors import UserError

    with pytest.raises(UserError, match="1 to 8 steps, not 9"):
        sampler.ladder(9)
