"""Qwen-Image and pipelines with its autoencoder or its text encoder: Krea 2, LongCat-Image, NucleusMoE, Ovis."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import tiny_autoencoder_kl, tiny_image
from zoo.parts import bytes_tokenizer, family, flow, inputs, language_model, qwen_processor, qwen_vl, wan_vae

SMALL = dict(height=32, width=32)
BOTH = "prompt negative_prompt"


def qwen_vae(levels: int = 2, channels: int = 4, **settings: Any) -> Any:
    """2^levels times smaller latents."""
    return wan_vae(channels, "AutoencoderKLQwenImage", dim_mult=[1] * (levels + 1), temperal_downsample=[False] + [True] * (levels - 1), **settings)


def qwen_image(name: str) -> dict[str, Any]:
    """Editing pipelines rescale their picture to a megapixel: the autoencoder shrinks it 32×, so that 256 tokens are left."""
    layered, edit = "Layered" in name, "Edit" in name
    channels = 8 if layered else 4  # four channels would be taken for RGBA
    sizes = dict(
        patch_size=2, in_channels=4 * channels, out_channels=channels, num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    extra = dict(use_additional_t_cond=True, use_layer3d_rope=True) if layered else {}
    vae = qwen_vae(5, base_dim=2, num_res_blocks=0) if edit else qwen_vae(4, 8, base_dim=2, num_res_blocks=0, input_channels=4) if layered else qwen_vae()
    parts = dict(
        scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=qwen_vl(), tokenizer=bytes_tokenizer(4096),
        transformer=diffusers.QwenImageTransformer2DModel(**sizes, **extra),
    )
    if "ControlNet" in name:
        parts["controlnet"] = diffusers.QwenImageControlNetModel(**sizes, extra_condition_channels=4 if "Inpaint" in name else 0)
    return {**parts, "processor": qwen_processor()} if edit or layered else parts


LARGE = dict(height=256, width=256)
family(
    qwen_image,
    QwenImagePipeline=("text-to-image", inputs(BOTH, **SMALL)),
    QwenImageImg2ImgPipeline=("image-to-image", inputs(BOTH + " image", **SMALL, strength=0.6)),
    QwenImageInpaintPipeline=("inpainting", inputs(BOTH + " image mask_image", **SMALL, strength=0.6)),
    QwenImageControlNetPipeline=("control", inputs(BOTH + " control_image", **SMALL)),
    QwenImageControlNetInpaintPipeline=("control", inputs(BOTH + " control_image control_mask", **SMALL)),
    QwenImageEditPipeline=("image-to-image", inputs(BOTH + " image", **LARGE)),
    QwenImageEditPlusPipeline=("image-to-image", inputs(BOTH + " image", **LARGE)),
    QwenImageEditInpaintPipeline=("inpainting", inputs(BOTH + " image mask_image", **LARGE, strength=0.6)),
    QwenImageLayeredPipeline=("image-to-image", inputs(BOTH, image=lambda: tiny_image(64).convert("RGBA"), layers=1, resolution=640)),
)


def qwen_image_21(name: str) -> dict[str, Any]:
    """RGBA pictures, latents 16× smaller and not packed."""
    vae = wan_vae(
        8, "AutoencoderKLQwenImage21", base_dim=4, decoder_base_dim=4, dim_mult=[1] * 5, temperal_downsample=[False, True, True, True], in_channels=4,
        out_channels=4, scale_factor_spatial=16,
    )
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=1, attention_head_dim=16, num_attention_heads=2, context_in_dim=16, axes_dims_rope=(8, 4, 4),
    )
    return dict(
        scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=qwen_vl(16, "Qwen3VLForConditionalGeneration"), processor=qwen_processor(3),
        transformer=transformer,
    )


family(qwen_image_21, QwenImage21Pipeline=("text-to-image", inputs(BOTH, height=64, width=64)))


def krea(name: str) -> dict[str, Any]:
    """Several layers of the text encoder go in, and through a small transformer of their own."""
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
        text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )
    return dict(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_vae(), text_encoder=qwen_vl(16, "Qwen3VLModel"), tokenizer=bytes_tokenizer(4096),
        transformer=transformer, text_encoder_select_layers=(1, 2),
    )


family(krea, Krea2Pipeline=("text-to-image", inputs(BOTH, **SMALL)))


def nucleus(name: str) -> dict[str, Any]:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4), moe_enabled=False, capacity_factors=[8.0, 8.0],
    )
    return dict(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=True), vae=qwen_vae(), text_encoder=qwen_vl(16, "Qwen3VLForConditionalGeneration"),
        processor=qwen_processor(3),
    )


family(nucleus, NucleusMoEImagePipeline=("text-to-image", inputs(BOTH, **SMALL, return_index=-1)))


def longcat(name: str) -> dict[str, Any]:
    transformer = diffusers.LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=[8, 4, 4],
    )
    edit = "Edit" in name
    vae = tiny_autoencoder_kl(16, (4,) * 6 if edit else (8, 16), shift_factor=0.1)
    return dict(
        scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=qwen_vl(), tokenizer=bytes_tokenizer(4096), text_processor=qwen_processor(),
        transformer=transformer,
    )


family(
    longcat,
    LongCatImagePipeline=("text-to-image", inputs(BOTH, height=16, width=16, enable_prompt_rewrite=False)),
    LongCatImageEditPipeline=("image-to-image", inputs(BOTH + " image", size=64)),
)


def ovis(name: str) -> dict[str, Any]:
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = tiny_autoencoder_kl(shift_factor=0.0609, scaling_factor=1.5035)
    return dict(
        scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=language_model(), tokenizer=bytes_tokenizer(4096), transformer=transformer,
    )


family(ovis, OvisImagePipeline=("text-to-image", inputs(BOTH, height=16, width=16)))
