"""AnimateDiff (Stable Diffusion with motion modules) and other videos of U-Nets."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    SparseControlNetModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from tiny import vp_scheduler

from zoo import stable_diffusion, stable_diffusion_xl
from zoo.core import PROMPT, add, assemble, case, tiny_clip_images, tiny_clip_vision, tiny_image, tiny_video
from zoo.stable_diffusion import SQUARE, TEXT, controlnet

FRAMES = {"num_frames": 2}
CLIP = {"video": lambda: tiny_video(2), "prompt": PROMPT, **SQUARE, "strength": 0.8}
FRAME_BY_FRAME = {"conditioning_frames": lambda: tiny_video(2)}


def motion() -> MotionAdapter:
    """Motion modules for ``tiny_unet2d_condition``."""
    return MotionAdapter(block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2)


def sparse_controlnet() -> SparseControlNetModel:
    return SparseControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, in_channels=4, conditioning_channels=3, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), conditioning_embedding_out_channels=(8, 16),
        use_simplified_condition_embedding=False, motion_num_attention_heads=2, motion_max_seq_length=8,
    )


def _animated(name: str) -> Any:
    def make() -> Any:
        scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
        family = stable_diffusion_xl if "XL" in name else stable_diffusion
        shared = family.parts(scheduler=scheduler, in_channels=9 if name == "PIAPipeline" else 4)
        net = (sparse_controlnet() if "Sparse" in name else controlnet(shared["unet"])) if "ControlNet" in name else None
        return assemble(name, **shared, motion_adapter=motion(), controlnet=net)

    return make


for _name, _task, _call in (
    ("AnimateDiffPipeline", "text-to-video", {**TEXT, **FRAMES}),
    ("AnimateDiffPAGPipeline", "text-to-video", {**TEXT, **FRAMES, "pag_scale": 3.0}),
    ("AnimateDiffSDXLPipeline", "text-to-video", {**TEXT, **FRAMES}),
    ("AnimateDiffControlNetPipeline", "control", {**TEXT, **FRAMES, **FRAME_BY_FRAME}),
    ("AnimateDiffSparseControlNetPipeline", "control", {**TEXT, **FRAMES, **FRAME_BY_FRAME, "controlnet_frame_indices": [0, 1]}),
    ("AnimateDiffVideoToVideoPipeline", "video", CLIP),
    ("AnimateDiffVideoToVideoControlNetPipeline", "video", {**CLIP, **FRAME_BY_FRAME}),
    ("PIAPipeline", "image-to-video", {**TEXT, **FRAMES, "image": lambda: tiny_image()}),
):
    add(_name, _task, _animated(_name), **_call)


@case("image-to-video", image=lambda: tiny_image(), **SQUARE, **FRAMES)
def StableVideoDiffusionPipeline() -> Any:
    return assemble(
        "StableVideoDiffusionPipeline", image_encoder=tiny_clip_vision(size=224, patch=56), feature_extractor=tiny_clip_images(224),
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, in_channels=3, out_channels=3,
        ),
        unet=UNetSpatioTemporalConditionModel(
            sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), addition_time_embed_dim=8,
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), projection_class_embeddings_input_dim=24,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0,
            steps_offset=1, timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        ),
    )


# Deprecated ones


def _unet3d() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )


@case("text-to-video", **TEXT, **FRAMES)
def TextToVideoSDPipeline() -> Any:
    return assemble("TextToVideoSDPipeline", **{**stable_diffusion.parts(), "unet": _unet3d()})


@case("video", prompt=PROMPT, video=lambda: tiny_video(2), strength=0.8)
def VideoToVideoSDPipeline() -> Any:
    return assemble("VideoToVideoSDPipeline", **{**stable_diffusion.parts(), "unet": _unet3d()})


ZERO = {"video_length": 2, "t0": 1, "t1": 3, **TEXT}
for _name, _family in (("TextToVideoZeroPipeline", stable_diffusion), ("TextToVideoZeroSDXLPipeline", stable_diffusion_xl)):
    add(_name, "text-to-video", lambda name=_name, family=_family: assemble(name, **family.parts(scheduler=vp_scheduler())), **ZERO)
