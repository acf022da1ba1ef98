"""Conditions, predictions and guidance: what every method relies on without looking."""

from collections.abc import Sequence

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from tiny import tiny_unet2d
from torch import Tensor

from distill.analytic import GaussianMixture, gaussian
from distill.call import flatten, unflatten
from distill.denoiser import Condition, Prediction, cat, guidance_embedding
from distill.guidance import Guided
from distill.sampling import Sampler, uniform_ladder
from distill.schedule import KINDS, CosineVP
from distill.teacher import Teacher


class Counting(GaussianMixture):
    """Notes the batch size of each call."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        self.sizes = [*getattr(self, "sizes", []), len(x_t)]
        return super().predict(x_t, t, condition, features)


def classes() -> Counting:
    return Counting(CosineVP(), torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0]]), torch.tensor([[0.4], [0.5], [0.3]]))


def labelled(labels: Sequence[int], guidance: Tensor | None = None) -> Condition:
    chosen = torch.tensor(labels)
    return Condition({"class_labels": chosen}, {"class_labels": torch.full_like(chosen, 3)}, guidance)


X, T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)


@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
def test_guidance_is_one_call_of_twice_the_batch(w: float) -> None:
    teacher, condition = classes(), labelled([0, 1, 2, 0])
    null, cond = teacher(X, T, condition.unconditional()), teacher(X, T, condition)
    teacher.sizes = []
    torch.testing.assert_close(Guided(teacher, w)(X, T, condition), null + w * (cond - null))
    assert teacher.sizes == [8]


def test_guidance_of_one_or_of_nothing_is_off() -> None:
    teacher, condition = classes(), labelled([0, 1, 2, 0])
    expected = teacher(X, T, condition), teacher(X, T, None)
    teacher.sizes = []
    assert torch.equal(Guided(teacher, 1.0)(X, T, condition), expected[0]) and torch.equal(Guided(teacher, 4.0)(X, T, None), expected[1])
    assert teacher.sizes == [4, 4]


def test_a_conditions_own_scale_wins() -> None:
    teacher, w = classes(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    mixed = Guided(teacher, 9.0)(X, T, labelled([0, 1, 2, 0], w))
    assert teacher.sizes == [8]
    for i in range(4):
        alone = Guided(teacher, float(w[i]))(X[i : i + 1], T[i], labelled([[0, 1, 2, 0][i]]))
        torch.testing.assert_close(mixed[i : i + 1], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_the_same_in_every_parameterisation(kind: str) -> None:
    teacher, condition = classes(), labelled([0, 1, 2, 0])
    null, cond = (teacher.predict(X, T, c).as_kind(kind) for c in (condition.unconditional(), condition))  # type: ignore[arg-type]
    guided = Guided(teacher, 2.5).predict(X, T, condition).as_kind(kind)  # type: ignore[arg-type]
    torch.testing.assert_close(guided, null + 2.5 * (cond - null), rtol=1e-4, atol=1e-5)


def test_guidance_on_a_network_is_one_forward() -> None:
    teacher = Teacher(tiny_unet2d())
    condition, seen = teacher.condition([0, 1, 2, 3, 4]), []
    teacher.backbone.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["sample"])), with_kwargs=True)
    Guided(teacher.denoiser, 3.0)(torch.randn(5, 1, 8, 8), torch.tensor(0.5), condition)
    assert seen == [10]


def test_features_are_the_conditional_halfs() -> None:
    teacher = classes()
    kept = Guided(teacher, 2.0).predict(X, T, labelled([0, 1, 2, 0]), ("state",)).features["state"]
    torch.testing.assert_close(kept, torch.cat([X, T[:, None].float()], 1))


def test_conditions() -> None:
    condition = labelled([0, 1, 2, 0], torch.arange(4.0))
    part = condition[1:3]
    assert part.values["class_labels"].tolist() == [1, 2] and part.guidance is not None and part.guidance.tolist() == [1, 2]
    assert condition.unconditional().values["class_labels"].tolist() == [3] * 4
    dropped = condition.dropped(torch.tensor([True, False, False, True]))
    assert dropped.values["class_labels"].tolist() == [3, 1, 2, 3] and dropped.null is condition.null
    assert condition.without_guidance().guidance is None and condition.with_guidance(torch.ones(4)).guidance is not None
    both = cat([condition, part])
    assert both.values["class_labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert both.null is not None and len(both.null["class_labels"]) == 6 and both.guidance is not None and len(both.guidance) == 6
    for nothing in (lambda: Condition().unconditional(), lambda: Condition().dropped(torch.ones(1, dtype=torch.bool))):
        with pytest.raises(ValueError, match="no null condition"):
            nothing()


def test_dropping_masks_whole_embeddings() -> None:
    condition = Condition({"text": torch.ones(3, 4, 5)}, {"text": torch.zeros(3, 4, 5)})
    kept = condition.dropped(torch.tensor([True, False, True])).values["text"]
    assert kept.sum((1, 2)).tolist() == [0, 20, 0]


def test_predictions_are_single_where_the_state_is_and_double_where_it_is() -> None:
    teacher = gaussian(CosineVP(), (0.0,), (1.0,))
    for dtype in (torch.float32, torch.float64):
        assert teacher.predict(torch.ones(2, 1, dtype=dtype), torch.tensor(0.5)).eps.dtype == dtype


def test_guidance_embedding_is_diffusers() -> None:
    pipeline = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    scale = torch.tensor([1.0, 2.5, 8.0])
    for width in (32, 33, 256):
        theirs = pipeline.get_guidance_scale_embedding(scale - 1, embedding_dim=width)
        torch.testing.assert_close(guidance_embedding(scale, width), theirs, rtol=1e-4, atol=1e-3)  # angles of up to 7,000


@pytest.mark.parametrize("trained", range(1, 9))
def test_ladders_are_those_of_the_lcm_scheduler(trained: int) -> None:
    scheduler = LCMScheduler(original_inference_steps=trained)
    for steps in range(1, trained + 1):
        scheduler.set_timesteps(steps, original_inference_steps=trained)
        ladder = Sampler(uniform_ladder(trained), trained).ladder(steps)
        assert [round(t * 1000) - 1 for t in ladder] == scheduler.timesteps.tolist()


def test_nested_arguments_flatten_and_come_back() -> None:
    nested = {"sample": 1, "added_cond_kwargs": {"time_ids": 2, "text_embeds": {"a": 3}}}
    flat = flatten(nested)
    assert flat == {"sample": 1, "added_cond_kwargs.time_ids": 2, "added_cond_kwargs.text_embeds.a": 3} and unflatten(flat) == nested
