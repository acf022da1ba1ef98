"""More text-to-image transformers: Lumina, OmniGen, PRX, Z-Image, ERNIE, GLM, Ideogram, DreamLite."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from zoo.core import tiny_autoencoder_kl, tiny_t5, tiny_t5_tokenizer
from zoo.parts import bytes_tokenizer, family, flow, inputs, language_model, qwen_processor, qwen_vl

SMALL = dict(height=16, width=16)
BOTH = "prompt negative_prompt"
SHIFTED = dict(shift_factor=0.0609, scaling_factor=1.5035)


def lumina(name: str) -> dict[str, Any]:
    """Latents are taken to be 8× smaller, whatever the autoencoder."""
    vae = tiny_autoencoder_kl(channels=(8,) * 4, **SHIFTED)
    if name == "LuminaPipeline":
        transformer = diffusers.LuminaNextDiT2DModel(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=1, num_attention_heads=2, num_kv_heads=2, multiple_of=16, learn_sigma=True,
            cross_attention_dim=16, scaling_factor=1.0,
        )
        return dict(transformer=transformer, scheduler=flow(), vae=vae, text_encoder=language_model(16, "GemmaForCausalLM"), tokenizer=bytes_tokenizer())
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=2, multiple_of=16,
        scaling_factor=1.0, axes_dim_rope=[8, 4, 4], axes_lens=[300, 32, 32], cap_feat_dim=16,
    )
    text = language_model(16, "Gemma2Model", sliding_window=16)
    return dict(transformer=transformer, scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=text, tokenizer=bytes_tokenizer(256))


family(
    lumina,
    LuminaPipeline=("text-to-image", inputs(BOTH, height=32, width=32, clean_caption=False, max_sequence_length=16)),
    Lumina2Pipeline=("text-to-image", inputs(BOTH, height=32, width=32, system_prompt="draw", max_sequence_length=32)),
)


def omnigen(name: str) -> dict[str, Any]:
    """Time runs from 0 (noise) to 1; the prompt's tokens are embedded by the network itself."""
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_layers=1, in_channels=4, time_step_dim=16, patch_size=2,
        vocab_size=300, pad_token_id=0, rope_scaling=dict(long_factor=[1] * 8, short_factor=[1] * 8), pos_embed_max_size=64,
    )
    scheduler = flow(invert_sigmas=True, num_train_timesteps=1)
    return dict(transformer=transformer, scheduler=scheduler, vae=tiny_autoencoder_kl(channels=(8,) * 4), tokenizer=bytes_tokenizer(1024))


family(omnigen, OmniGenPipeline=("text-to-image", inputs("prompt", height=32, width=32)))


def prx(name: str) -> dict[str, Any]:
    pixel = name == "PRXPixelPipeline"
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=4 if pixel else 2, in_channels=3 if pixel else 4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[8, 8],
        **(dict(bottleneck_size=8, resolution_embeds=True) if pixel else {}),
    )
    parts = dict(transformer=transformer, scheduler=flow(), text_encoder=language_model(), tokenizer=bytes_tokenizer())
    return parts if pixel else {**parts, "vae": tiny_autoencoder_kl(**SHIFTED)}


family(
    prx,
    PRXPipeline=("text-to-image", inputs(BOTH, **SMALL, use_resolution_binning=False)),
    PRXPixelPipeline=("text-to-image", inputs(BOTH, **SMALL, use_resolution_binning=False)),
)


def z_image(name: str) -> dict[str, Any]:
    sizes = dict(all_patch_size=(2,), all_f_patch_size=(1,), dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    omni = "Omni" in name
    transformer = diffusers.ZImageTransformer2DModel(
        **sizes, in_channels=4, n_layers=1, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32], siglip_feat_dim=16 if omni else None,
    )
    parts = dict(
        scheduler=flow(use_dynamic_shifting=True), vae=tiny_autoencoder_kl(**SHIFTED), text_encoder=language_model(), tokenizer=bytes_tokenizer(64),
        transformer=transformer,
    )
    if "ControlNet" in name:
        parts["controlnet"] = diffusers.ZImageControlNetModel(
            **sizes, control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=9 if "Inpaint" in name else 4,
            add_control_noise_refiner="control_noise_refiner",
        )
    if omni:
        parts["siglip"] = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4, num_patches=16,
        ))
        parts["siglip_processor"] = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    return parts


Z = dict(**SMALL, max_sequence_length=64)
family(
    z_image,
    ZImagePipeline=("text-to-image", inputs(BOTH, **Z)),
    ZImageOmniPipeline=("text-to-image", inputs(BOTH, **Z)),
    ZImageImg2ImgPipeline=("image-to-image", inputs(BOTH + " image", **Z, strength=0.6)),
    ZImageInpaintPipeline=("inpainting", inputs(BOTH + " image mask_image", **Z, strength=0.6)),
    ZImageControlNetPipeline=("control", inputs(BOTH + " control_image", **Z)),
    ZImageControlNetInpaintPipeline=("control", inputs(BOTH + " image mask_image control_image", **Z)),
)


def flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=4, norm_num_groups=4,
    )


def ernie(name: str) -> dict[str, Any]:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=16, rope_axes_dim=(8, 4, 4),
    )
    return dict(transformer=transformer, vae=flux2_vae(), text_encoder=language_model(), tokenizer=bytes_tokenizer(64), scheduler=flow())


family(ernie, ErnieImagePipeline=("text-to-image", inputs(BOTH, **SMALL, use_pe=False)))


def glm(name: str) -> dict[str, Any]:
    """The tokens that an autoregressive model (here for loading only) would draw first are given."""
    drawer = transformers.GlmImageForConditionalGeneration(transformers.GlmImageConfig(
        text_config=dict(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vision_vocab_size=16,
            max_position_embeddings=64, rope_parameters=dict(mrope_section=(1, 2, 1), rope_type="default", rope_theta=1e4), pad_token_id=0,
        ),
        vision_config=dict(depth=1, hidden_size=16, num_heads=2, image_size=16, patch_size=8, intermediate_size=16),
        vq_config=dict(embed_dim=16, num_embeddings=16, latent_channels=16),
    ))
    names = ("image_token", "grid_bos_token", "grid_eos_token")
    tokens = bytes_tokenizer(64, model_specific_special_tokens={name: f"<|{name}|>" for name in names})
    processor = transformers.GlmImageProcessor(image_processor=transformers.GlmImageImageProcessor(), tokenizer=tokens)
    transformer = diffusers.GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16, time_embed_dim=16,
        condition_dim=8, prior_vq_quantizer_codebook_size=16,
    )
    vae = tiny_autoencoder_kl(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return dict(
        tokenizer=tiny_t5_tokenizer(), processor=processor, text_encoder=tiny_t5(), vision_language_encoder=drawer, vae=vae, transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
    )


GLYPH = dict(prompt='a "red" apple', max_sequence_length=16)  # the text encoder reads what stands in quotes
family(glm, GlmImagePipeline=("text-to-image", inputs("", GLYPH, prior_token_ids=lambda: torch.arange(16)[None], **SMALL)))


def ideogram(name: str) -> dict[str, Any]:
    """Two networks: the unconditional one guides. Thirteen layers of the text encoder go in."""

    def network() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, intermediate_size=32, adaln_dim=16, llm_features_dim=13 * 8,
            mrope_section=(4, 2, 2),
        )

    return dict(
        scheduler=flow(), vae=flux2_vae(), text_encoder=qwen_vl(8, "Qwen3VLModel", layers=36), tokenizer=bytes_tokenizer(64), transformer=network(),
        unconditional_transformer=network(),
    )


family(ideogram, Ideogram4Pipeline=("text-to-image", inputs("prompt", **SMALL, max_sequence_length=64, guidance_schedule=None)))


def dreamlite(name: str) -> dict[str, Any]:
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), block_out_channels=(16, 32), cross_attention_dim=16, attention_head_dim=8,
        layers_per_block=1, norm_num_groups=8, transformer_layers_per_block=1,
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    )
    return dict(
        text_encoder=qwen_vl(16, "Qwen3VLForConditionalGeneration"), tokenizer=bytes_tokenizer(4096), processor=qwen_processor(3), vae=vae, unet=unet,
        scheduler=flow(use_dynamic_shifting=name == "DreamLitePipeline"),
    )


family(
    dreamlite,
    DreamLitePipeline=("text-to-image", inputs(BOTH, **SMALL)),
    DreamLiteMobilePipeline=("text-to-image", inputs("prompt", **SMALL)),
)
