"""Teachers by recording: the rebuilt denoiser is the pipeline's own network, called the way the pipeline calls it."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from tiny import tiny_stable_diffusion, tiny_unet2d, unet2d, vp_scheduler

from distill import running
from distill.errors import UserError
from distill.teacher import Guidance, Teacher

PROMPTS = ["a red apple", "a photograph of a blue car", "green"]


def pipeline_images(pipeline: Any, steps: int, **call: Any) -> torch.Tensor:
    images = pipeline(num_inference_steps=steps, output_type="np", generator=torch.Generator().manual_seed(3), **call).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def our_images(teacher: Teacher, inputs: list[Any], steps: int, guidance: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = teacher.noise(len(inputs), generator)
    return teacher.decode(teacher.sample(teacher.condition(inputs), noise, steps, guidance, generator))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion_is_reproduced(prediction_type: str, scheduler: Any, guidance: float) -> None:
    pipeline = tiny_stable_diffusion(scheduler=vp_scheduler(prediction_type, cls=scheduler))
    teacher = Teacher(pipeline)
    assert teacher.check() <= 1e-5 and teacher.denoiser.kind == {"epsilon": "eps", "v_prediction": "v"}[prediction_type]
    theirs = pipeline_images(pipeline, 5, prompt=PROMPTS, guidance_scale=guidance)
    assert (our_images(teacher, PROMPTS, 5, guidance) - theirs).abs().max() <= 1e-5
    assert theirs.std() > 0.01


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_class_conditional_pixels_are_reproduced(prediction_type: str, guidance: float) -> None:
    pipeline = tiny_unet2d(prediction_type=prediction_type, zero_snr=prediction_type != "epsilon")
    teacher = Teacher(pipeline)
    assert teacher.classes == 10 and teacher.input_name == "class_labels" and teacher.check() <= 1e-5
    theirs = pipeline_images(pipeline, 5, class_labels=[1, 2, 3], guidance_scale=guidance)
    assert (our_images(teacher, [1, 2, 3], 5, guidance) - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(("pipeline_class", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_stock_unconditional_pixels_are_reproduced(pipeline_class: Any, scheduler: Any) -> None:
    pipeline = pipeline_class(unet2d(None), scheduler())
    pipeline.set_progress_bar_config(disable=True)
    teacher = Teacher(pipeline)
    assert teacher.input_name is None and teacher.classes is None and not teacher.condition([None]).values
    assert (our_images(teacher, [None] * 2, 5) - pipeline_images(pipeline, 5, batch_size=2)).abs().max() <= 1e-5


def test_guidance_is_one_call_of_the_network() -> None:
    teacher = Teacher(tiny_unet2d())
    calls: list[int] = []
    condition, x, t = teacher.condition([1, 2]), torch.randn(2, 1, 8, 8), torch.tensor(0.6)
    handle = teacher.backbone.register_forward_pre_hook(lambda m, a, k: calls.append(len(k["sample"])), with_kwargs=True)
    guided = teacher.guided(2.5)(x, t, condition)
    assert calls == [4]
    handle.remove()
    plain, null = teacher.denoiser(x, t, condition), teacher.denoiser(x, t, condition.unconditional())
    torch.testing.assert_close(guided, null + 2.5 * (plain - null), atol=1e-5, rtol=1e-5)


def tiny_dit() -> DiTPipeline:
    """A pipeline that puts the conditional half first, as some do, and drops a learnt variance."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, attention_bias=True, sample_size=8, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )
    pipeline = DiTPipeline(transformer, tiny_stable_diffusion().vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_conditional_half_is_found_not_assumed() -> None:
    usual, swapped = Teacher(tiny_stable_diffusion()), Teacher(tiny_dit())
    assert usual.guidance == Guidance("guidance_scale", 1.0, 2, 1, 1, "plain")
    assert swapped.guidance == Guidance("guidance_scale", 1.0, 2, 1, 0, "plain")
    condition = swapped.condition([3, 7])
    assert condition.null is not None
    assert condition.values["class_labels"].tolist() == [3, 7] and condition.null["class_labels"].tolist() == [1000, 1000]
    assert swapped.reproduce(4) <= 1e-5 and swapped.reproduce(4, 3.0) <= 1e-5


def test_a_denoiser_that_is_not_the_teacher_is_refused() -> None:
    teacher = Teacher(tiny_unet2d())
    with torch.no_grad():
        next(teacher.backbone.parameters()).add_(0.1)
    with pytest.raises(UserError, match="differs from its backbone"):
        teacher.check()


def test_dropout_left_on_would_break_parity_so_it_is_switched_off() -> None:
    pipeline = tiny_unet2d()
    pipeline.unet = unet2d(dropout=0.5).train()
    teacher = Teacher(pipeline)
    assert not teacher.backbone.training and teacher.check() <= 1e-5


def test_encode_and_decode_are_near_inverse_in_pixel_space() -> None:
    teacher = Teacher(tiny_unet2d())
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(teacher.decode(teacher.encode(images)), images / 2 + 0.5)
    latent = Teacher(tiny_stable_diffusion())
    assert latent.image_shape == (3, 16, 16) and latent.encode(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 8, 8)


def test_pipelines_without_a_backbone_are_refused() -> None:
    class Nothing:
        components: dict[str, Any] = {}

    with pytest.raises(UserError, match="no backbone"):
        Teacher(Nothing())


def test_resting_encoders_are_awake_only_while_they_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device there is nothing to move: the moves are watched with another type of device pretended."""
    pipeline = tiny_stable_diffusion()
    teacher = Teacher(pipeline)
    before = teacher.condition(PROMPTS)
    moves: list[str] = []
    monkeypatch.setattr(running, "_device", lambda module: torch.device("cuda"))
    for module in (pipeline.text_encoder, pipeline.vae):
        monkeypatch.setattr(type(module), "to", lambda self, device: moves.append(str(device)))
    teacher.rest_encoders()
    assert moves == ["cpu"] * 2
    after = teacher.condition(PROMPTS)
    assert moves == ["cpu"] * 2 + ["cuda"] * 2 + ["cpu"] * 2
    assert teacher.condition(PROMPTS) is after and len(moves) == 6
    torch.testing.assert_close(after.values["encoder_hidden_states"], before.values["encoder_hidden_states"])
