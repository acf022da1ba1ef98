"""Auxiliary terms of the student's loss: their values, where their gradient goes, and what they say where something is missing."""

import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import perturb, tiny_stable_diffusion, tiny_unet2d
from torch import Tensor

from distill.analytic import AffineGenerator, gaussian
from distill.denoiser import Condition
from distill.errors import UserError
from distill.losses import perceptual
from distill.losses.metrics import pseudo_huber
from distill.matching.rollout import Sample, roll_out
from distill.matching.terms import Clip, Context, Denoising, Drifting, Embedding, Regression, Reward, Term
from distill.methods.base import Batch, Pairs
from distill.methods.distribution import DistributionMatching
from distill.methods.dmd2 import DMD2
from distill.roles import Roles, build_roles
from distill.schedule import CosineVP
from distill.teacher import Teacher

SCHEDULE = CosineVP()


def brightness(images: Tensor, inputs: Sequence[Any]) -> Tensor:
    """A reward."""
    return images.flatten(1).mean(1)


def absolute(a: Tensor, b: Tensor) -> Tensor:
    """A distance."""
    return (a - b).abs().flatten(1).mean(1)


def context(x: Tensor, real: Tensor | None = None, group: Tensor | None = None, **settings: Any) -> Context:
    teacher = gaussian(SCHEDULE, (0.0,) * x.shape[1], (1.0,) * x.shape[1])
    roles = Roles(teacher, AffineGenerator(SCHEDULE, (0.1,) * x.shape[1], (0.8,) * x.shape[1]), decode=lambda v: v)
    return Context(roles, Batch(torch.zeros_like(x), Condition(), real, group=group, **settings), Sample(x, x))


# -- rewards ------------------------------------------------------------------------------------------------------------


def test_a_clamped_reward_has_no_gradient_above_the_clamp() -> None:
    x = torch.tensor([[0.1], [0.3], [0.6], [0.9]], requires_grad=True)
    loss = Reward(function=f"{__name__}:brightness", clamp=0.5).loss(context(x))
    assert float(loss.detach()) == pytest.approx((0.4 + 0.2) / 4)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.flatten().tolist() == pytest.approx([-0.25, -0.25, 0.0, 0.0])
    (unclamped,) = torch.autograd.grad(Reward(function=f"{__name__}:brightness").loss(context(x)), x)
    assert unclamped.flatten().tolist() == pytest.approx([-0.25] * 4)


def test_an_unclamped_reward_runs_away_and_a_clamped_one_stops() -> None:
    def end(clamp: float | None) -> float:
        x = torch.zeros(8, 1, requires_grad=True)
        optimizer = torch.optim.Adam([x], 0.1)
        for _ in range(100):
            optimizer.zero_grad()
            Reward(function=f"{__name__}:brightness", clamp=clamp).loss(context(x)).backward()
            optimizer.step()
        return float(x.detach().mean())

    assert 0.5 <= end(0.5) < 1.5 < 5 < end(None)


def test_the_weight_decays_to_zero() -> None:
    x = torch.zeros(2, 1, requires_grad=True)
    halfway = [Reward(function=f"{__name__}:brightness", clamp=1.0, weight=2.0, decay=d).weighted(context(x, progress=0.5)) for d in ("constant", "linear")]  # type: ignore[arg-type]
    assert [float(w.detach()) for w, _ in halfway] == [2.0, 1.0] and [float(v) for _, v in halfway] == [1.0, 1.0]


def latent_step(term: Term) -> tuple[Tensor, list[Tensor], Teacher]:
    """(loss, gradients of the student, teacher) of a term on a latent text pipeline, decoded by its own autoencoder."""
    teacher = Teacher(tiny_stable_diffusion())
    roles, _ = build_roles(teacher, ["student"])
    perturb(roles.parameters("student"))
    roles.decode = teacher.decode_with_gradient
    torch.manual_seed(0)
    prompts = ["a red apple", "a cat"]
    condition, noise = teacher.condition(prompts), torch.randn(2, *teacher.sample_shape)
    pairs = Pairs(noise, torch.randn_like(noise), condition)
    sample = roll_out(roles.student, "backward_simulation", (1.0,), noise, condition)
    loss = term.loss(Context(roles, Batch(noise, condition, inputs=prompts, pairs=pairs), sample))
    return loss, list(torch.autograd.grad(loss, roles.parameters("student"), allow_unused=True)), teacher


@pytest.mark.parametrize("term", [Reward(function=f"{__name__}:brightness"), Regression(decoded=True)])
def test_gradients_reach_the_student_through_the_autoencoder(term: Term) -> None:
    loss, gradients, teacher = latent_step(term)
    assert torch.isfinite(loss) and sum(g is not None and bool(g.any()) for g in gradients) > 0.9 * len(gradients)
    assert all(p.grad is None and not p.requires_grad for _, module in teacher.encoders() for p in module.parameters())


# -- CLIP and LPIPS -----------------------------------------------------------------------------------------------------


class TinyClip(torch.nn.Module):
    """Two towers on 4×4 pixels and on the length of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = types.SimpleNamespace(image_size=(4, 4), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))

    def encode_image(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, 4, 4)
        return torch.stack([pixels.mean((1, 2, 3)), torch.ones(len(pixels))], 1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return torch.stack([tokens.float(), torch.ones(len(tokens))], 1)


def test_clip_compares_images_with_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_clip", lambda *a: (TinyClip(), lambda texts: torch.tensor([len(t) for t in texts])))
    images = torch.stack([torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 1.0)]).requires_grad_()
    cosine = perceptual.clip_similarity(images, ["", "a"], "any", "any")
    assert cosine.tolist() == pytest.approx([1.0, 1.0])  # (0, 1)·(0, 1) and (1, 1)·(1, 1)
    assert perceptual.clip_similarity(images, ["aa", ""], "any", "any").tolist() == pytest.approx([5**-0.5, 2**-0.5])
    for clamp, pulled in ((-1.0, False), (1.0, True)):
        loss, gradients, _ = latent_step(Clip(clamp=clamp))
        assert any(g is not None and bool(g.any()) for g in gradients) == pulled and (float(loss) > 0) == pulled
    method = DMD2(terms=[{"kind": "clip", "weight": 0.1, "clamp": 0.35, "decay": "linear"}])  # type: ignore[list-item]  # SwiftBrush v2
    assert method.needs_decoder() and isinstance(method.terms[0], Clip)
    with pytest.raises(UserError, match="takes no prompts"):
        perceptual.clip_similarity(images, [3, 4], "any", "any")


def test_clip_and_lpips_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def offline(*arguments: Any, **settings: Any) -> Any:
        raise ConnectionError("a long story\nover two lines")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match=r"^term clip needs ViT-B-32 of laion2b_s34b_b79k, which could not .*\(ConnectionError\): go online once$"):
        perceptual.clip_similarity(torch.zeros(1, 3, 8, 8), ["a cat"], "ViT-B-32", "laion2b_s34b_b79k")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises((ValidationError, ValueError), match="needs the package lpips"):
        Regression(metric="lpips")


def test_lpips_is_called_with_images_in_its_own_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Fake(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            seen.extend([a, b])
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    module: Any = types.ModuleType("lpips")
    module.LPIPS, module.__spec__ = lambda net, verbose: Fake(), types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "lpips", module)
    perceptual._lpips.cache_clear()
    a, b = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    value = perceptual.lpips(a, b)
    perceptual._lpips.cache_clear()
    assert value.tolist() == [4.0, 4.0] and seen[0].shape == (2, 3, 32, 32) and float(seen[0].min()) == -1 and float(seen[1].max()) == 1
    assert Regression(metric="lpips").needs_decoder and not Regression().needs_decoder


# -- regression, denoising ----------------------------------------------------------------------------------------------


def test_regression_is_the_distance_of_the_students_map_to_the_pairs() -> None:
    z, x0 = torch.randn(16, 2), torch.randn(16, 2)
    told = context(torch.zeros(16, 2), pairs=Pairs(z, x0, Condition()))
    mapped = 0.1 + 0.8 * z
    for metric, wanted in (("pseudo_huber", pseudo_huber(mapped, x0)), (f"{__name__}:absolute", absolute(mapped, x0))):
        torch.testing.assert_close(Regression(metric=metric).loss(told).float(), wanted.mean())
    method = DMD2(terms=[Regression()])
    wanted_pairs = method.needs_pairs()
    assert wanted_pairs is not None and wanted_pairs.paired and wanted_pairs.count == 10_000 and not method.needs_images()
    assert DMD2().needs_pairs() is None


def test_pairs_are_made_with_the_guidance_that_is_learnt() -> None:
    wanted = [
        DMD2(guidance_scale=3.0, terms=[Regression()]), DMD2(guidance_scale=(1.0, 4.0), terms=[Regression()]),
        DMD2(guidance_scale=3.0, terms=[Regression()], pairs={"guidance_scale": 1.5, "steps": 4, "count": 5}),  # type: ignore[arg-type]
    ]
    found = [m.needs_pairs() for m in wanted]
    assert [f.guidance_scale for f in found if f] == [3.0, 2.5, 1.5] and found[2] is not None and (found[2].steps, found[2].count) == (4, 5)


def test_denoising_is_zero_for_the_exact_denoiser_and_pulls_any_other() -> None:
    teacher = gaussian(SCHEDULE, (0.5,), (1e-4,))  # a point: its denoiser knows x0
    x0 = torch.full((64, 1), 0.5)
    exact = Denoising().loss(Context(Roles(teacher, teacher), Batch(x0, Condition(), x0), Sample(x0, x0)))
    other = Denoising().loss(Context(Roles(teacher, AffineGenerator(SCHEDULE, (0.0,), (1.0,))), Batch(x0, Condition(), x0), Sample(x0, x0)))
    assert float(exact) < 1e-6 < 0.1 < float(other.detach())


# -- real samples that the teacher made ---------------------------------------------------------------------------------


def test_real_samples_may_be_the_teachers_own() -> None:
    method = DMD2(terms=[Embedding()], real="teacher")
    wanted = method.needs_pairs()
    assert wanted is not None and not wanted.paired and not method.needs_images()
    with pytest.raises(ValidationError, match="nothing here looks at real samples"):
        DMD2(real="teacher")
    seen: list[Batch] = []

    class Noting(Term):
        kind: str = "noting"
        needs_images = True

        def loss(self, context: Context) -> Tensor:
            seen.append(context.batch)
            return context.sample.x0.sum() * 0

    teacher = gaussian(SCHEDULE, (0.0,), (1.0,))
    roles = Roles(teacher, AffineGenerator(SCHEDULE, (0.1,), (0.8,)))
    told = Condition({"class_labels": torch.tensor([1, 1])})
    made = Pairs(torch.ones(2, 1), torch.full((2, 1), 7.0), told, torch.tensor([1, 1]), [1, 1])
    next(iter(DistributionMatching(objective="none", terms=[Noting()], real="teacher").step(roles, Batch(torch.zeros(2, 1), Condition(), pairs=made))))
    assert seen[0].x0 is made.x0 and seen[0].condition is told and seen[0].inputs == [1, 1] and torch.equal(seen[0].noise, torch.zeros(2, 1))


# -- groups -------------------------------------------------------------------------------------------------------------


def test_conditions_do_not_interact_in_a_drift() -> None:
    """The gradient of one class's samples does not know the other class is there."""
    torch.manual_seed(0)
    teacher = Teacher(tiny_unet2d())
    roles, _ = build_roles(teacher, ["student"])
    x, real, group = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.arange(8) % 2
    noise = {"randn_like": torch.zeros_like}

    def gradient(change: float, term: Drifting) -> Tensor:
        live = torch.where((group == 1)[:, None, None, None], x + change, x).requires_grad_()
        batch = Batch(x, teacher.condition([int(g) for g in group]), real, group=group)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", noise["randn_like"])
            torch.manual_seed(1)
            (found,) = torch.autograd.grad(term.loss(Context(roles, batch, Sample(live, live))), live)
        return found[group == 0]

    alone, together = Drifting(), Drifting(by_condition=False)
    torch.testing.assert_close(gradient(0.0, alone), gradient(1.0, alone), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(gradient(0.0, together), gradient(1.0, together), rtol=1e-2, atol=1e-6)
    with pytest.raises(UserError, match="no two samples"):
        alone.loss(Context(roles, Batch(x[:2], teacher.condition([0, 1]), real[:2], group=torch.tensor([0, 1])), Sample(x[:2], x[:2])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "none", "terms": [{"kind": "embedding"}], "critic_steps": {"lag": 0.3}}, "trains no critic to adapt to"),
        ({"terms": [{"kind": "regression", "metric": "lpps"}]}, "there is no metric 'lpps'"),
        ({"steps": 2, "step_odds": [1.0]}, "step_odds must be 2 numbers"),
        ({"objective": "none", "steps": 2, "rollout": "any_steps", "gan": {"real": "longer", "features": "teacher"}}, "trains them by nothing"),
        ({"gan": {"features": "random", "mismatched": True, "conditional": False}}, "told the condition"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistributionMatching(**settings)


def test_step_odds() -> None:
    torch.manual_seed(0)
    student = AffineGenerator(SCHEDULE, (0.1,), (0.8,))
    steps = [roll_out(student, "any_steps", (1.0, 0.5), torch.zeros(1, 1), Condition(), odds=[3.0, 1.0]).steps for _ in range(400)]
    assert sum(s == 1 for s in steps) / 400 == pytest.approx(0.75, abs=0.07)
