"""Wan and pipelines built on it: SkyReels V2, Lucy Edit, ChronoEdit, AnyFlow."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import tiny_clip_images, tiny_clip_vision, tiny_mask, tiny_t5, tiny_t5_tokenizer, tiny_video
from zoo.parts import family, flow, inputs, wan_vae

BOTH = "prompt negative_prompt"
VIDEO = dict(height=32, width=32, num_frames=9, max_sequence_length=16)


def network(channels: int = 4, cls: str = "WanTransformer3DModel", **settings: Any) -> Any:
    return getattr(diffusers, cls)(**{
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": channels, "out_channels": 4, "text_dim": 16, "freq_dim": 16,
        "ffn_dim": 32, "num_layers": 1, "cross_attn_norm": True, "rope_max_seq_len": 32, **settings,
    })


def base(scheduler: Any = None) -> dict[str, Any]:
    return dict(tokenizer=tiny_t5_tokenizer(), text_encoder=tiny_t5(), vae=wan_vae(), scheduler=scheduler or flow(shift=7.0))


def eyes() -> dict[str, Any]:
    return dict(image_encoder=tiny_clip_vision(16, 16), image_processor=tiny_clip_images(16))


def wan(name: str) -> dict[str, Any]:
    """Image-to-video networks read the latents, those of the given frames, and a mask of four channels."""
    if name == "WanVACEPipeline":
        return dict(**base(), transformer=network(cls="WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=2 * 4 + 64))
    if name == "WanAnimatePipeline":
        transformer = network(
            12, "WanAnimateTransformer3DModel", latent_channels=4, image_dim=16, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16,
            face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=1,
        )
        return dict(**base(), **eyes(), transformer=transformer)
    if name == "WanImageToVideoPipeline":
        return dict(**base(), **eyes(), transformer=network(12, image_dim=16))
    return dict(**base(), transformer=network(8 if name == "LucyEditPipeline" else 4))


family(
    wan,
    WanPipeline=("text-to-video", inputs(BOTH, **VIDEO)),
    WanImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **VIDEO)),
    WanVideoToVideoPipeline=("video", inputs(BOTH + " video", height=32, width=32, max_sequence_length=16, strength=0.6)),
    WanVACEPipeline=("video", inputs(BOTH + " video", **VIDEO, mask=lambda: [tiny_mask(32)] * 9)),
    WanAnimatePipeline=("image-to-video", inputs(
        BOTH + " image", height=32, width=32, max_sequence_length=16, segment_frame_length=9, pose_video=lambda: tiny_video(9, 32),
        face_video=lambda: tiny_video(9, 16),
    )),
    LucyEditPipeline=("video", inputs(BOTH + " video", **VIDEO)),
)


def skyreels(name: str) -> dict[str, Any]:
    """Diffusion forcing gives each frame a time of its own."""
    parts = base(diffusers.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"))
    if name == "SkyReelsV2ImageToVideoPipeline":
        return dict(**parts, **eyes(), transformer=network(12, "SkyReelsV2Transformer3DModel", image_dim=16))
    return dict(**parts, transformer=network(cls="SkyReelsV2Transformer3DModel"))


FORCING = dict(**VIDEO, base_num_frames=9)
family(
    skyreels,
    SkyReelsV2Pipeline=("text-to-video", inputs(BOTH, **VIDEO)),
    SkyReelsV2ImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **VIDEO)),
    SkyReelsV2DiffusionForcingPipeline=("text-to-video", inputs(BOTH, **FORCING)),
    SkyReelsV2DiffusionForcingImageToVideoPipeline=("image-to-video", inputs(BOTH + " image", **FORCING)),
    SkyReelsV2DiffusionForcingVideoToVideoPipeline=("video", inputs(BOTH, **{**FORCING, "num_frames": 17}, video=lambda: tiny_video(9, 32), overlap_history=5)),
)


def chronoedit(name: str) -> dict[str, Any]:
    return dict(**base(), **eyes(), transformer=network(12, "ChronoEditTransformer3DModel", image_dim=16))


family(chronoedit, ChronoEditPipeline=("image-to-image", inputs(BOTH + " image", height=32, width=32, num_frames=5, max_sequence_length=16)))


def anyflow(name: str) -> dict[str, Any]:
    """A flow map: the network is told the time it starts from and the time it goes to."""
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    far = dict(compressed_patch_size=(1, 4, 4), full_chunk_limit=3, chunk_partition=(1, 1, 1)) if "FAR" in name else {}
    transformer = network(cls="AnyFlowFARTransformer3DModel" if far else "AnyFlowTransformer3DModel", gate_value=0.25, deltatime_type="r", **far)
    return dict(**base(scheduler), transformer=transformer)


family(
    anyflow,
    AnyFlowPipeline=("text-to-video", inputs(BOTH, **VIDEO)),
    AnyFlowFARPipeline=("text-to-video", inputs(BOTH, **VIDEO)),
)
