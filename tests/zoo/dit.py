"""Text-to-image transformers with one or two pipelines each: AuraFlow, Bria, Chroma, CogView, HiDream, HunyuanImage."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import tiny_autoencoder_kl, tiny_clip_text, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer
from zoo.parts import bytes_tokenizer, family, flow, inputs, language_model, qwen_vl, wan_vae

SMALL = dict(height=16, width=16, max_sequence_length=16)
BOTH = "prompt negative_prompt"


def auraflow(name: str) -> dict[str, Any]:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, pos_embed_max_size=64,
    )
    return dict(tokenizer=tiny_t5_tokenizer(), text_encoder=tiny_t5(), vae=tiny_autoencoder_kl(), transformer=transformer, scheduler=flow())


family(auraflow, AuraFlowPipeline=("text-to-image", inputs(BOTH, **SMALL)))


def bria(name: str) -> dict[str, Any]:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )
    return dict(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=True), vae=tiny_autoencoder_kl(shift_factor=0), text_encoder=tiny_t5(),
        tokenizer=tiny_t5_tokenizer(),
    )


family(bria, BriaPipeline=("text-to-image", inputs(BOTH, **SMALL)))


def fibo(name: str) -> dict[str, Any]:
    """Latents are 16× smaller than the image; every layer of the language model conditions a block."""
    transformer = diffusers.BriaFiboTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        text_encoder_dim=16, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )
    vae = wan_vae(16, base_dim=4, in_channels=12, out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16)
    return dict(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=True), vae=vae, text_encoder=language_model(16, "SmolLM3ForCausalLM"),
        tokenizer=bytes_tokenizer(64),
    )


EDIT = '{"text": "a red apple", "edit_instruction": "make it green"}'
family(
    fibo,
    BriaFiboPipeline=("text-to-image", inputs(BOTH, height=64, width=64)),
    BriaFiboEditPipeline=("image-to-image", inputs("negative_prompt image", prompt=EDIT, height=64, width=64, _auto_resize=False)),
)


def chroma(name: str) -> dict[str, Any]:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8], approximator_hidden_dim=16, approximator_layers=1, approximator_num_channels=16,
    )
    transformer.register_to_config(guidance_embeds=False)  # ChromaInpaintPipeline reads it from the published config
    vae = tiny_autoencoder_kl(shift_factor=0.0609, scaling_factor=1.5035)
    return dict(scheduler=flow(), vae=vae, text_encoder=tiny_t5(), tokenizer=tiny_t5_tokenizer(), transformer=transformer)


family(
    chroma,
    ChromaPipeline=("text-to-image", inputs(BOTH, **SMALL)),
    ChromaImg2ImgPipeline=("image-to-image", inputs(BOTH + " image", **SMALL, strength=0.6)),
    ChromaInpaintPipeline=("inpainting", inputs(BOTH + " image mask_image", **SMALL, strength=0.6)),
)


def cogview3(name: str) -> dict[str, Any]:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=16, time_embed_dim=16,
        condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return dict(tokenizer=tiny_t5_tokenizer(), text_encoder=tiny_t5(), vae=tiny_autoencoder_kl(), transformer=transformer, scheduler=scheduler)


def cogview4(name: str) -> dict[str, Any]:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=8 if "Control" in name else 4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=16,
        time_embed_dim=16, condition_dim=4, sample_size=8,
    )
    scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear")
    return dict(
        tokenizer=bytes_tokenizer(padding_side="left"), text_encoder=language_model(16, "GlmForCausalLM"), vae=tiny_autoencoder_kl(), transformer=transformer,
        scheduler=scheduler,
    )


family(cogview3, CogView3PlusPipeline=("text-to-image", inputs(BOTH, **SMALL)))
family(
    cogview4,
    CogView4Pipeline=("text-to-image", inputs(BOTH, **SMALL)),
    CogView4ControlPipeline=("control", inputs(BOTH + " control_image", **SMALL)),
)


def hidream(name: str) -> dict[str, Any]:
    """Four text encoders: two CLIPs (pooled), T5, and all layers of a Llama."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, caption_channels=[16, 16],
        text_emb_dim=32, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=(0, 1),
    )
    return dict(
        scheduler=flow(), vae=tiny_autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tiny_clip_text(projection=16), tokenizer=tiny_clip_tokenizer(), text_encoder_2=tiny_clip_text(projection=16),
        tokenizer_2=tiny_clip_tokenizer(),
        text_encoder_3=tiny_t5(), tokenizer_3=tiny_t5_tokenizer(), text_encoder_4=language_model(16, "LlamaForCausalLM"), tokenizer_4=bytes_tokenizer(),
        transformer=transformer,
    )


family(hidream, HiDreamImagePipeline=("text-to-image", inputs(BOTH, **SMALL)))


def hunyuan(name: str) -> dict[str, Any]:
    """Embedded guidance here; without it the pipeline's guidance belongs to a guider component."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1),
        guidance_embeds=True, text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1, scaling_factor=0.476986,
        spatial_compression_ratio=8, sample_size=64,
    )
    return dict(
        scheduler=flow(shift=7.0), vae=vae, text_encoder=qwen_vl(), tokenizer=bytes_tokenizer(128), text_encoder_2=tiny_t5(), tokenizer_2=tiny_t5_tokenizer(),
        transformer=transformer,
    )


family(hunyuan, HunyuanImagePipeline=("text-to-image", inputs("prompt", height=32, width=32)))
