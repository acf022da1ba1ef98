"""Stable Diffusion XL and its siblings: two text encoders, pooled text and sizes beside the time."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetUnionModel, ControlNetXSAdapter, EulerDiscreteScheduler
from diffusers.utils import is_sentencepiece_available
from tiny import vp_scheduler

from zoo.core import PROMPT, UNBUILDABLE, add, assemble, case, tensor, tiny_clip_text, tiny_clip_tokenizer, tiny_image
from zoo.stable_diffusion import CONTROL, CONTROL_EDIT, CONTROL_PAINT, EDIT, PAINT, SQUARE, TEXT, adapter, controlnet, sde_dpm
from zoo.stable_diffusion import parts as stable_diffusion_parts

PAG = {"pag_scale": 3.0}
STRENGTH = {"strength": 0.8}


def parts(**settings: Any) -> dict[str, Any]:
    """Every component that a pipeline of the family may ask for; six numbers (sizes and crops) enter beside the time."""
    unet = {
        "cross": 32, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 6 * 8 + 16, **settings,
    }
    scheduler = unet.pop("scheduler", None) or vp_scheduler(cls=EulerDiscreteScheduler, steps_offset=1, timestep_spacing="leading")
    return {
        **stable_diffusion_parts(scheduler, **unet), "text_encoder_2": tiny_clip_text(projection=16), "tokenizer_2": tiny_clip_tokenizer(),
        "image_encoder": None, "feature_extractor": None,
    }


def _plain(name: str, **settings: Any) -> Any:
    return lambda: assemble(name, **parts(**settings))


def _controlled(name: str) -> Any:
    def make() -> Any:
        shared = parts()
        if "Union" in name:
            return assemble(name, **shared, controlnet=union(shared["unet"]))
        return assemble(name, **shared, controlnet=controlnet(shared["unet"]))

    return make


def union(unet: Any) -> ControlNetUnionModel:
    """One ControlNet of several kinds of control."""
    shared = (
        "in_channels", "down_block_types", "block_out_channels", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim",
        "attention_head_dim", "norm_num_groups", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    return ControlNetUnionModel(
        **{k: unet.config[k] for k in shared}, conditioning_embedding_out_channels=(8, 16), num_control_type=2, num_trans_channel=16, num_trans_head=2,
        num_trans_layer=1, num_proj_channel=16,
    )


for _name, _task, _call, _settings in (
    ("StableDiffusionXLPipeline", "text-to-image", TEXT, {}),
    ("StableDiffusionXLImg2ImgPipeline", "image-to-image", {**EDIT, **STRENGTH}, {}),
    ("StableDiffusionXLInpaintPipeline", "inpainting", {**PAINT, **SQUARE}, {"in_channels": 9}),
    ("StableDiffusionXLInstructPix2PixPipeline", "image-to-image", {**EDIT, **SQUARE}, {"in_channels": 8}),
    ("StableDiffusionXLPAGPipeline", "text-to-image", {**TEXT, **PAG}, {}),
    ("StableDiffusionXLPAGImg2ImgPipeline", "image-to-image", {**EDIT, **PAG, **STRENGTH}, {}),
    ("StableDiffusionXLPAGInpaintPipeline", "inpainting", {**PAINT, **SQUARE, **PAG}, {"in_channels": 9}),
):
    add(_name, _task, _plain(_name, **_settings), **_call)

MODE = {"control_mode": 0}
for _name, _call in (
    ("StableDiffusionXLControlNetPipeline", CONTROL),
    ("StableDiffusionXLControlNetImg2ImgPipeline", CONTROL_EDIT),
    ("StableDiffusionXLControlNetInpaintPipeline", CONTROL_PAINT),
    ("StableDiffusionXLControlNetPAGPipeline", {**CONTROL, **PAG}),
    ("StableDiffusionXLControlNetPAGImg2ImgPipeline", {**CONTROL_EDIT, **PAG}),
    ("StableDiffusionXLControlNetUnionPipeline", {**TEXT, **MODE, "control_image": lambda: tiny_image()}),
    ("StableDiffusionXLControlNetUnionImg2ImgPipeline", {**CONTROL_EDIT, **MODE}),
    ("StableDiffusionXLControlNetUnionInpaintPipeline", {**CONTROL_PAINT, **MODE}),
):
    add(_name, "control", _controlled(_name), **_call)


@case("control", **CONTROL)
def StableDiffusionXLAdapterPipeline() -> Any:
    return assemble("StableDiffusionXLAdapterPipeline", **parts(), adapter=adapter())


@case("control", **CONTROL)
def StableDiffusionXLControlNetXSPipeline() -> Any:
    shared = parts(layers_per_block=2, transformer_layers_per_block=1)
    net = ControlNetXSAdapter.from_unet(shared["unet"], size_ratio=0.5, num_attention_heads=2, conditioning_embedding_out_channels=(8, 16))
    return assemble("StableDiffusionXLControlNetXSPipeline", **shared, controlnet=net)


@case("image-to-image", editing_prompt=[PROMPT], use_intersect_mask=False)
def LEditsPPPipelineStableDiffusionXL() -> Any:
    """Its call needs an inversion of an image first."""
    pipeline = assemble("LEditsPPPipelineStableDiffusionXL", **parts(scheduler=sde_dpm()))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.invert(image=tiny_image(32), num_inversion_steps=4, skip=0.25)
    return pipeline


# Kolors: one large language model (GLM, with a tokenizer of its own: given here by its embeddings)

EMBEDS = {
    "prompt_embeds": lambda: tensor(1, 8, 24, seed=1), "negative_prompt_embeds": lambda: tensor(1, 8, 24, seed=2),
    "pooled_prompt_embeds": lambda: tensor(1, 16, seed=3), "negative_pooled_prompt_embeds": lambda: tensor(1, 16, seed=4), **SQUARE,
}

for _name, _call in (("KolorsPipeline", {}), ("KolorsPAGPipeline", PAG)) if is_sentencepiece_available() else ():
    add(_name, "text-to-image", lambda name=_name: assemble(name, **{**parts(encoder_hid_dim=24), "text_encoder": None, "tokenizer": None}), **EMBEDS, **_call)

UNBUILDABLE["KolorsImg2ImgPipeline"] = "ignores pooled_prompt_embeds in this diffusers release, so that it needs its GLM and tokenizer"
