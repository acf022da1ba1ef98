"""Text-to-video transformers: CogVideoX, Mochi, EasyAnimate, HunyuanVideo."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo.core import UNBUILDABLE, tensor, tiny_clip_text, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_video
from zoo.parts import bytes_tokenizer, embeddings, family, flow, hunyuan_video_vae, inputs, language_model, qwen_vl, siglip

BOTH = "prompt negative_prompt"
SMALL = dict(height=16, width=16, max_sequence_length=16)


def cogvideo(name: str) -> dict[str, Any]:
    """Control and image-to-video networks read twice the channels."""
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8,) * 4, latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )
    sizes = dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4 if name in ("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline") else 8, out_channels=4,
        time_embed_dim=16, text_embed_dim=16, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    if name == "CogVideoXImageToVideoPipeline":
        sizes.update(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True)
    transformer = diffusers.CogVideoXTransformer3DModel(**sizes)
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return dict(tokenizer=tiny_t5_tokenizer(), text_encoder=tiny_t5(), vae=vae, transformer=transformer, scheduler=scheduler)


family(
    cogvideo,
    CogVideoXPipeline=("text-to-video", inputs(BOTH, **SMALL, num_frames=8)),
    CogVideoXImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **SMALL, num_frames=8)),
    CogVideoXVideoToVideoPipeline=("video", inputs(BOTH, **SMALL, video=lambda: tiny_video(8), strength=0.6)),
    CogVideoXFunControlPipeline=("control", inputs(BOTH, **SMALL, control_video=lambda: tiny_video(8))),
)


def mochi(name: str) -> dict[str, Any]:
    """The autoencoder is Mochi's own: 8× in space, 6× in time, 12 channels fixed."""
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12, out_channels=None,
        qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu", max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )
    return dict(scheduler=flow(), vae=vae, text_encoder=tiny_t5(), tokenizer=tiny_t5_tokenizer(), transformer=transformer)


family(mochi, MochiPipeline=("text-to-video", inputs(BOTH, **SMALL, num_frames=7)))


def easyanimate(name: str) -> dict[str, Any]:
    """Inpainting reads a mask and the masked video too."""
    channels = 9 if "Inpaint" in name else 4
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=16, text_embed_dim=16, num_layers=1, sample_width=16,
        sample_height=16, patch_size=2,
    )
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3), up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False,
    )
    vae.register_to_config(cache_mag_vae=True)  # EasyAnimateInpaintPipeline reads it from the published config
    return dict(vae=vae, text_encoder=qwen_vl(16, "Qwen2VLForConditionalGeneration"), tokenizer=bytes_tokenizer(512), transformer=transformer, scheduler=flow())


EASY = dict(height=16, width=16, num_frames=5)
family(
    easyanimate,
    EasyAnimatePipeline=("text-to-video", inputs(BOTH, **EASY)),
    EasyAnimateInpaintPipeline=("video", inputs(
        BOTH, **EASY, video=lambda: tensor(1, 3, 5, 16, 16).sigmoid(), mask_video=lambda: (torch.arange(16) < 8).float().expand(1, 1, 5, 16, 16),
    )),
)


UNBUILDABLE["EasyAnimateControlPipeline"] = "broken in this diffusers release: its call passes text_encoder_index, which its encode_prompt does not take"
UNBUILDABLE["ConsisIDPipeline"] = "needs OpenCV to be imported"
TOKENS = "draws discrete tokens: there is no continuous state between noise and data"
UNBUILDABLE.update(DiffusionGemmaPipeline=TOKENS, LLaDA2Pipeline=TOKENS, RFD4ProteinaPipeline="draws proteins: no picture, sound or video")


def hunyuan_video(name: str) -> dict[str, Any]:
    """Two text encoders (tokens, pooled); the picture goes in as channels, or as tokens (FramePack)."""
    sizes = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1,
        patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 4, 4),
    )
    parts = dict(
        text_encoder=language_model(16, "LlamaModel"), tokenizer=bytes_tokenizer(256), vae=hunyuan_video_vae(), scheduler=flow(shift=7.0),
        text_encoder_2=tiny_clip_text(length=77), tokenizer_2=tiny_clip_tokenizer(77),
    )
    if "Framepack" in name:
        sizes.update(patch_size=2, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True)
        return dict(**parts, **siglip(), transformer=diffusers.HunyuanVideoFramepackTransformer3DModel(**sizes))
    if name == "HunyuanSkyreelsImageToVideoPipeline":
        sizes["in_channels"] = 8
    if name == "HunyuanVideoImageToVideoPipeline":
        sizes.update(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat")
        parts.update(image_processor=None)
    return dict(**parts, transformer=diffusers.HunyuanVideoTransformer3DModel(**sizes))


PLAIN = dict(height=16, width=16, num_frames=9, max_sequence_length=16, prompt_template={"template": "{}", "crop_start": 0})
GIVEN = {**embeddings("prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask"),
         "pooled_prompt_embeds": lambda: tensor(1, 16), "negative_pooled_prompt_embeds": lambda: tensor(1, 16, seed=1)}
family(
    hunyuan_video,
    HunyuanVideoPipeline=("text-to-video", inputs("prompt", **PLAIN)),
    HunyuanVideoImageToVideoPipeline=("image-to-video", inputs("image", GIVEN, height=16, width=16, num_frames=9)),
    HunyuanSkyreelsImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **PLAIN)),
    HunyuanVideoFramepackPipeline=("image-to-video", inputs("prompt image", **{**PLAIN, "height": 32, "width": 32}, latent_window_size=3)),
)


def hunyuan_video_15(name: str) -> dict[str, Any]:
    """Guidance belongs to the guider component."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1,
        patch_size_t=1,
        text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(2, 2, 4), target_size=16, task_type="i2v" if "Image" in name else "t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4, temporal_compression_ratio=2,
        downsample_match_channel=False, upsample_match_channel=False,
    )
    parts = dict(
        text_encoder=language_model(16, "Qwen3Model"), tokenizer=bytes_tokenizer(4096), transformer=transformer, vae=vae, scheduler=flow(shift=7.0),
        text_encoder_2=tiny_t5(), tokenizer_2=tiny_t5_tokenizer(), guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    if "Image" in name:
        parts.update(siglip())
    return parts


family(
    hunyuan_video_15,
    HunyuanVideo15Pipeline=("text-to-video", inputs(BOTH, height=16, width=16, num_frames=9)),
    HunyuanVideo15ImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", num_frames=9)),
)
