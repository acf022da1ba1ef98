"""Flux and its relatives: packed latents, image and text ids, embedded guidance."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import UNBUILDABLE, tiny_autoencoder_kl, tiny_clip_text, tiny_clip_tokenizer, tiny_image, tiny_t5, tiny_t5_tokenizer
from zoo.parts import bytes_tokenizer, family, flow, inputs, language_model

SMALL = dict(height=16, width=16, max_sequence_length=16)
VAE = dict(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


def network(channels: int, out: int | None = None, cls: str = "FluxTransformer2DModel", **settings: Any) -> Any:
    return getattr(diffusers, cls)(**{
        "patch_size": 1, "in_channels": channels, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "axes_dims_rope": [4, 4, 8], **({} if out is None else {"out_channels": out}), **settings,
    })


def flux(name: str) -> dict[str, Any]:
    """The network reads 4·4 channels; twice that with a control image; Fill adds the masked image (16) and the mask (4 · 2·2 pixels per latent)."""
    control = name.startswith("FluxControl") and "ControlNet" not in name
    channels = 48 if "Fill" in name or "VisualCloze" in name else 32 if control else 16
    embedded = dict(pooled_projection_dim=16, guidance_embeds=True)
    parts = dict(
        scheduler=flow(use_dynamic_shifting=True), vae=tiny_autoencoder_kl(**VAE), text_encoder=tiny_clip_text(), tokenizer=tiny_clip_tokenizer(),
        text_encoder_2=tiny_t5(), tokenizer_2=tiny_t5_tokenizer(), transformer=network(channels, 16, **embedded),
    )
    if "ControlNet" in name:
        parts["controlnet"] = network(16, cls="FluxControlNetModel", **embedded)
    return {**parts, "resolution": 16} if "VisualCloze" in name else parts


CLOZE = dict(  # one example pair, then a picture whose partner is drawn
    image=lambda: [[tiny_image(), tiny_image(16, 1)], [tiny_image(16, 2), None]], task_prompt="a", content_prompt="red apple", max_sequence_length=16,
)
family(
    flux,
    FluxPipeline=("text-to-image", inputs("prompt", **SMALL)),
    FluxImg2ImgPipeline=("image-to-image", inputs("prompt image", **SMALL, strength=0.6)),
    FluxKontextPipeline=("image-to-image", inputs("prompt image", **SMALL, max_area=256, _auto_resize=False)),
    FluxInpaintPipeline=("inpainting", inputs("prompt image mask_image", **SMALL, strength=0.6)),
    FluxKontextInpaintPipeline=("inpainting", inputs("prompt image mask_image", **SMALL, strength=0.6, max_area=256, _auto_resize=False)),
    FluxFillPipeline=("inpainting", inputs("prompt image mask_image", **SMALL)),
    FluxControlPipeline=("control", inputs("prompt control_image", **SMALL)),
    FluxControlImg2ImgPipeline=("control", inputs("prompt image control_image", **SMALL, strength=0.6)),
    FluxControlInpaintPipeline=("control", inputs("prompt image mask_image control_image", **SMALL, strength=0.6)),
    FluxControlNetPipeline=("control", inputs("prompt control_image", **SMALL)),
    FluxControlNetImg2ImgPipeline=("control", inputs("prompt image control_image", **SMALL, strength=0.6)),
    FluxControlNetInpaintPipeline=("control", inputs("prompt image mask_image control_image", **SMALL, strength=0.6)),
    VisualClozeGenerationPipeline=("image-to-image", CLOZE),
    VisualClozePipeline=("image-to-image", CLOZE | dict(upsampling_height=16, upsampling_width=16, upsampling_strength=0.6)),
)


def flux2(name: str) -> dict[str, Any]:
    """Flux.2: latents of a 2×2 patch, a language model's layer as text; Klein has no embedded guidance."""
    klein = "Klein" in name
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=4, norm_num_groups=4,
    )
    transformer = network(16, cls="Flux2Transformer2DModel", timestep_guidance_channels=16, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=not klein)
    text = language_model(16, "Qwen3ForCausalLM" if klein else "MistralForCausalLM")
    return dict(scheduler=flow(use_dynamic_shifting=True), vae=vae, transformer=transformer, text_encoder=text, tokenizer=bytes_tokenizer(512))


KLEIN = dict(height=16, width=16, max_sequence_length=64, text_encoder_out_layers=(1,))
family(
    flux2,
    Flux2Pipeline=("text-to-image", inputs("prompt", **KLEIN)),
    Flux2KleinPipeline=("text-to-image", inputs("prompt", **KLEIN)),
    Flux2KleinKVPipeline=("image-to-image", inputs("prompt", **KLEIN, image=lambda: tiny_image(64))),
    Flux2KleinInpaintPipeline=("inpainting", inputs("prompt image mask_image", **KLEIN, strength=0.6)),
)


UNBUILDABLE["FluxPriorReduxPipeline"] = "has no denoising network: turns an image into prompt embeddings"
