"""Cosmos: images, and videos that continue a picture. Its safety checker needs a package of its own: one that lets everything pass stands in."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import tensor, tiny_t5, tiny_t5_tokenizer
from zoo.parts import bytes_tokenizer, family, flow, inputs, qwen_vl, wan_vae
from zoo.unchecked import Unchecked

BOTH = "prompt negative_prompt"
SMALL = dict(height=32, width=32, max_sequence_length=16)


def network(channels: int, **settings: Any) -> Any:
    """A mask of the image's padding is added to the channels."""
    return diffusers.CosmosTransformer3DModel(**{
        "in_channels": channels, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "mlp_ratio": 2, "text_embed_dim": 16,
        "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable", **settings,
    })


def cosmos(name: str) -> dict[str, Any]:
    """The first version is an EDM network, the second a flow: both are preconditioned inside the pipeline's loop. Pictures add a mask of the given frames."""
    parts = dict(text_encoder=tiny_t5(), tokenizer=tiny_t5_tokenizer(), safety_checker=Unchecked(), transformer=network(5 if "VideoToWorld" in name else 4))
    if name.startswith("Cosmos2"):
        return dict(**parts, vae=wan_vae(), scheduler=flow(use_karras_sigmas=True))
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, attention_resolutions=(8,), resolution=64, num_layers=2,
        patch_size=4, patch_type="haar", scaling_factor=1.0, spatial_compression_ratio=4, temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000, prediction_type="epsilon", rho=7.0,
        final_sigmas_type="sigma_min",
    )
    return dict(**parts, vae=vae, scheduler=scheduler)


family(
    cosmos,
    Cosmos2TextToImagePipeline=("text-to-image", inputs(BOTH, **SMALL)),
    Cosmos2VideoToWorldPipeline=("image-to-video", inputs(BOTH + " image", **SMALL, num_frames=9)),
    CosmosTextToWorldPipeline=("text-to-video", inputs(BOTH, **SMALL, num_frames=9)),
    CosmosVideoToWorldPipeline=("image-to-video", inputs(BOTH + " image", **SMALL, num_frames=9)),
)


def cosmos25(name: str) -> dict[str, Any]:
    """All layers of a Qwen-VL go in, side by side."""
    controlled = "Transfer" in name
    parts = dict(
        text_encoder=qwen_vl(16), tokenizer=bytes_tokenizer(512), vae=wan_vae(), safety_checker=Unchecked(),
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=False),
        transformer=network(5, text_embed_dim=32, **(
            dict(controlnet_block_every_n=1, img_context_dim_in=16, img_context_num_tokens=4, img_context_dim_out=32) if controlled else {}
        )),
    )
    if controlled:
        parts["controlnet"] = diffusers.CosmosControlNetModel(
            n_controlnet_blocks=1, in_channels=6, latent_channels=6, model_channels=32, num_attention_heads=2, attention_head_dim=16, mlp_ratio=2,
            text_embed_dim=32,
            adaln_lora_dim=4, patch_size=(1, 2, 2), max_size=(4, 32, 32), rope_scale=(2.0, 1.0, 1.0), extra_pos_embed_type="learnable", img_context_dim_in=16,
            img_context_dim_out=32, use_crossattn_projection=False,
        )
    return parts


LONG = {**SMALL, "max_sequence_length": 160}  # the chat template comes first
family(
    cosmos25,
    Cosmos2_5_PredictBasePipeline=("text-to-video", inputs(BOTH, **LONG, num_frames=5)),
    Cosmos2_5_TransferPipeline=("control", inputs(
        BOTH, **LONG, controls=lambda: [tensor(3, 32, 32, seed=seed) for seed in range(5)], num_frames=5, num_frames_per_chunk=16,
    )),
)


def omni(name: str) -> dict[str, Any]:
    """One decoder for text and pictures: the prompt is part of the sequence."""
    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=12, hidden_act="relu2", hidden_size=24, intermediate_size=24, latent_channel=4, latent_patch_size=1, num_attention_heads=2,
        num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=4, qk_norm_for_text=False, rms_norm_eps=1e-5, rope_axes_dim=[2, 2, 2], vocab_size=300,
    )
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return dict(transformer=transformer, text_tokenizer=bytes_tokenizer(512), vae=wan_vae(), scheduler=scheduler, enable_safety_checker=False)


PLAIN = dict(use_system_prompt=False, add_resolution_template=False, add_duration_template=False)
family(omni, Cosmos3OmniPipeline=("text-to-image", inputs(BOTH, height=32, width=32, num_frames=1, **PLAIN)))
