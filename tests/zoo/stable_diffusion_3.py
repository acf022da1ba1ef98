"""Stable Diffusion 3: two CLIPs and T5, a transformer, flow matching."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel

from zoo.core import add, assemble, case, tiny_autoencoder_kl, tiny_clip_text, tiny_clip_tokenizer, tiny_image, tiny_mask, tiny_t5, tiny_t5_tokenizer
from zoo.stable_diffusion import EDIT, PAINT, SQUARE, TEXT

LENGTH = {"max_sequence_length": 16}


def parts(channels: int = 4) -> dict[str, Any]:
    """Every component of the family; latents of 8×8 in patches of two."""
    return {
        "transformer": SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": tiny_autoencoder_kl(channels, shift_factor=0.06),
        "text_encoder": tiny_clip_text(projection=16), "tokenizer": tiny_clip_tokenizer(), "text_encoder_2": tiny_clip_text(projection=16),
        "tokenizer_2": tiny_clip_tokenizer(), "text_encoder_3": tiny_t5(32), "tokenizer_3": tiny_t5_tokenizer(),
    }


for _name, _task, _call in (
    ("StableDiffusion3Pipeline", "text-to-image", TEXT),
    ("StableDiffusion3Img2ImgPipeline", "image-to-image", {**EDIT, **SQUARE}),
    ("StableDiffusion3InpaintPipeline", "inpainting", {**PAINT, **SQUARE}),
    ("StableDiffusion3PAGPipeline", "text-to-image", {**TEXT, "pag_scale": 0.7}),
    ("StableDiffusion3PAGImg2ImgPipeline", "image-to-image", {**EDIT, **SQUARE, "pag_scale": 0.7}),
):
    add(_name, _task, lambda name=_name: assemble(name, **parts(16 if "Inpaint" in name else 4)), **_call, **LENGTH)


@case("control", **TEXT, **LENGTH, control_image=lambda: tiny_image())
def StableDiffusion3ControlNetPipeline() -> Any:
    shared = parts()
    net = SD3ControlNetModel.from_transformer(shared["transformer"], num_layers=1, num_extra_conditioning_channels=0)
    return assemble("StableDiffusion3ControlNetPipeline", **shared, controlnet=net)


@case("inpainting", **TEXT, **LENGTH, control_image=lambda: tiny_image(), control_mask=lambda: tiny_mask())
def StableDiffusion3ControlNetInpaintingPipeline() -> Any:
    shared = parts()
    net = SD3ControlNetModel.from_transformer(shared["transformer"], num_layers=1, num_extra_conditioning_channels=1)
    return assemble("StableDiffusion3ControlNetInpaintingPipeline", **shared, controlnet=net)
