"""Folders that hold the configuration of well-known pipelines and nothing else: no weights, no tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLIP_L = {
    "architectures": ["CLIPTextModel"], "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "vocab_size": 49408, "hidden_act": "quick_gelu", "model_type": "clip_text_model",
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280, "hidden_act": "gelu",
}
T5 = {
    "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512,
    "scaling_factor": 0.18215,
}
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SD15_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "use_linear_projection": True,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
FLUX_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_stable_diffusion(folder: Path, unet: dict[str, Any] | None = None) -> Path:
    """Stable Diffusion 1.5; ``unet`` overrides its UNet's configuration."""
    config = SD15_UNET | (unet or {})
    write_json(folder / "unet/config.json", config)
    write_json(folder / "text_encoder/config.json", CLIP_L | {"hidden_size": config["cross_attention_dim"]})  # a multiple of 12
    write_json(folder / "vae/config.json", VAE)
    write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", **VP})
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
    })
    return folder


def write_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL."""
    write_json(folder / "unet/config.json", SDXL_UNET)
    write_json(folder / "text_encoder/config.json", CLIP_L)
    write_json(folder / "text_encoder_2/config.json", CLIP_G | {"architectures": ["CLIPTextModelWithProjection"]})
    write_json(folder / "vae/config.json", VAE | {"sample_size": 1024, "scaling_factor": 0.13025})
    scheduler = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "force_zeros_for_empty_prompt": True,
    })
    return folder


def write_sd3(folder: Path) -> Path:
    """Stable Diffusion 3 medium."""
    write_json(folder / "transformer/config.json", SD3_TRANSFORMER)
    write_json(folder / "text_encoder/config.json", CLIP_L | {"architectures": ["CLIPTextModelWithProjection"]})
    write_json(folder / "text_encoder_2/config.json", CLIP_G | {"architectures": ["CLIPTextModelWithProjection"]})
    write_json(folder / "text_encoder_3/config.json", T5)
    write_json(folder / "vae/config.json", VAE | {"latent_channels": 16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609})
    write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    })
    return folder
