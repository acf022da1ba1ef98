"""Videos again: SANA-Video, SANA-WM (a camera moves), Helios, Motif-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from zoo.core import tiny_t5, tiny_t5_tokenizer
from zoo.ltx import ltx2
from zoo.parts import bytes_tokenizer, family, flow, inputs, language_model, wan_vae

BOTH = "prompt negative_prompt"
VIDEO = dict(height=32, width=32, max_sequence_length=16)


def sana_video(name: str) -> dict[str, Any]:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=12,
        cross_attention_dim=24, caption_channels=16, mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )
    scheduler = flow() if name.endswith("ImageToVideoPipeline") else diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0,
    )
    text = language_model(16, "Gemma2Model", sliding_window=16)
    return dict(tokenizer=bytes_tokenizer(), text_encoder=text, vae=wan_vae(), transformer=transformer, scheduler=scheduler)


SANA = dict(**VIDEO, frames=9, complex_human_instruction=None, use_resolution_binning=False)
family(
    sana_video,
    SanaVideoPipeline=("text-to-video", inputs(BOTH, **SANA)),
    SanaImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **SANA)),
)


def world(name: str) -> dict[str, Any]:
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16, caption_channels=16, mlp_ratio=2.0,
        chunk_plucker_channels=12, chunk_plucker_post_attn_blocks=1, image_size=32,
    )
    text = language_model(16, "Gemma2ForCausalLM", sliding_window=16)
    return dict(tokenizer=bytes_tokenizer(), text_encoder=text, vae=ltx2("")["vae"], transformer=transformer, scheduler=flow())


WALK = dict(action="w-8", intrinsics=[32.0, 32.0, 16.0, 16.0])
family(world, SanaWMPipeline=("image-to-video", inputs(BOTH + " image", **VIDEO, num_frames=9, **WALK)))


def helios(name: str) -> dict[str, Any]:
    """Chunk after chunk, each sees the ones before; the pyramid starts small."""
    transformer = diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_dim=(4, 4, 4), has_multi_term_memory_patch=True, guidance_cross_attn=True,
        zero_history_timestep=True, is_amplify_history=False,
    )
    stages = dict(stages=3, gamma=0.3) if "Pyramid" in name else dict(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    scheduler = diffusers.HeliosScheduler(**stages)
    return dict(tokenizer=tiny_t5_tokenizer(), text_encoder=tiny_t5(), vae=wan_vae(), scheduler=scheduler, transformer=transformer)


family(
    helios,
    HeliosPipeline=("text-to-video", inputs(BOTH, **VIDEO, num_frames=9)),
    HeliosPyramidPipeline=("text-to-video", inputs(
        BOTH, height=64, width=64, max_sequence_length=16, num_frames=9, pyramid_num_inference_steps_list=[1, 1, 1],
    )),
)


def motif(name: str) -> dict[str, Any]:
    """Guidance belongs to the guider component."""
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1, mlp_ratio=2.0, patch_size=1,
        patch_size_t=1, qk_norm="rms_norm", text_embed_dim=16, image_embed_dim=16 if "Image2" in name else None, rope_axes_dim=(4, 4, 4),
    )
    config = transformers.T5Gemma2EncoderConfig(
        text_config=dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=300, max_position_embeddings=128, head_dim=8,
            num_key_value_heads=2, dropout_rate=0.0,
        ),
        vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4),
    )
    parts = dict(
        scheduler=flow(shift=7.0), vae=wan_vae(), text_encoder=transformers.models.t5gemma2.modeling_t5gemma2.T5Gemma2Encoder(config),
        tokenizer=bytes_tokenizer(), transformer=transformer, guider=diffusers.AdaptiveProjectedGuidance(),
    )
    return {**parts, "feature_extractor": transformers.SiglipImageProcessor(size={"height": 16, "width": 16})} if "Image2" in name else parts


family(
    motif,
    MotifVideoPipeline=("text-to-video", inputs(BOTH, **VIDEO, num_frames=9)),
    MotifVideoImage2VideoPipeline=("image-to-video", inputs(BOTH + " image", **VIDEO, num_frames=9)),
)
