"""LTX (video) and LTX 2 (video and sound from one network)."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import UNBUILDABLE, tiny_image, tiny_t5, tiny_t5_tokenizer
from zoo.parts import bytes_tokenizer, family, flow, inputs, language_model

BOTH = "prompt negative_prompt"
VIDEO = dict(height=32, width=32, num_frames=9, max_sequence_length=16)


def ltx(name: str) -> dict[str, Any]:
    """Latents 4× smaller in space and time here; packed to tokens."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=1,
        caption_channels=16,
    )
    return dict(scheduler=flow(), vae=vae, text_encoder=tiny_t5(), tokenizer=tiny_t5_tokenizer(), transformer=transformer)


LONG = {**VIDEO, "num_frames": 17, "temporal_tile_size": 9, "temporal_overlap": 4, "decode_horizontal_tiles": 1, "decode_vertical_tiles": 1}
family(
    ltx,
    LTXPipeline=("text-to-video", inputs(BOTH, **VIDEO)),
    LTXImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **VIDEO)),
    LTXConditionPipeline=("image-to-video", inputs(BOTH + " image", **VIDEO)),
    LTXI2VLongMultiPromptPipeline=("image-to-video", inputs(BOTH, **LONG, cond_image=lambda: tiny_image(32))),
)
UNBUILDABLE["LTX2VideoDiffusionDecodePipeline"] = "a decoder: its steps are fixed by its scheduler, its call takes latents only"
UNBUILDABLE["LTX2DFRTemporalRefinePipeline"] = "refines the latents, keyframes and sound of LTX2DFRPipeline, with an upsampler between its steps"
UPSAMPLER = "has no denoising loop: a network enlarges the latents once"
UNBUILDABLE.update(LTXLatentUpsamplePipeline=UPSAMPLER, LTX2LatentUpsamplePipeline=UPSAMPLER)


def ltx2(name: str) -> dict[str, Any]:
    """Every layer of the text encoder goes in, through connectors; a vocoder makes the sound of the audio latents."""
    layers = 2
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4,
        audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
        qk_norm="rms_norm_across_heads", caption_channels=16, rope_double_precision=False, rope_type="split",
        use_keyframes_abs_pos_embedding="DFR" in name,
    )
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=layers + 1, video_connector_num_attention_heads=2, video_connector_attention_head_dim=8,
        video_connector_num_layers=1, video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1, audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_double_precision=False,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,), timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2, resolution=32, latent_channels=2,
        norm_type="pixel", causality_axis="height", dropout=0.0, mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True,
        mel_bins=8,
    )
    vocoder = diffusers.pipelines.ltx2.LTX2Vocoder(
        in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]], leaky_relu_negative_slope=0.1, output_sampling_rate=16000,
    )
    return dict(
        scheduler=flow(), vae=vae, audio_vae=audio_vae, text_encoder=language_model(16, "Qwen3ForCausalLM", layers), tokenizer=bytes_tokenizer(64),
        connectors=connectors, transformer=transformer, vocoder=vocoder,
    )


def reference() -> Any:
    return diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora.LTX2HDRReferenceCondition(frames=tiny_image(32), strength=1.0)


def frame() -> Any:
    return diffusers.pipelines.ltx2.pipeline_ltx2_condition.LTX2VideoCondition(frames=tiny_image(32), index=0, strength=1.0, crf=0)


SOUND = dict(height=32, width=32, num_frames=5, frame_rate=25.0, max_sequence_length=16)
HDR = dict(stg_scale=0.0, modality_scale=1.0, guidance_rescale=0.0, use_cross_timestep=False)  # only plain guidance
ONE = dict(
    **HDR, audio_guidance_scale=None, audio_stg_scale=0.0, audio_modality_scale=1.0, audio_guidance_rescale=0.0, spatio_temporal_guidance_blocks=None,
)
family(
    ltx2,
    LTX2Pipeline=("text-to-video", inputs(BOTH, **SOUND, **ONE)),
    LTX2ImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **SOUND, **ONE, image_crf=0)),
    LTX2ConditionPipeline=("image-to-video", inputs(BOTH, **SOUND, **ONE, conditions=lambda: frame())),
    LTX2InContextPipeline=("image-to-video", inputs(BOTH, **SOUND, **ONE, conditions=lambda: frame())),
    LTX2DFRPipeline=("text-to-video", inputs("prompt", **SOUND)),
    LTX2HDRPipeline=("video", inputs(BOTH, **SOUND, **HDR, reference_conditions=lambda: reference())),
)
