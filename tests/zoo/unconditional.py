"""Pipelines without a prompt (noise, or a class), and the first latent diffusion models."""

from __future__ import annotations

from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    IPNDMScheduler,
    KarrasVeScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UNet1DModel,
    UNet2DModel,
    VQModel,
)
from tiny import vp_scheduler

from zoo.core import PROMPT, assemble, case, tiny_autoencoder_kl, tiny_clip_text, tiny_clip_tokenizer, tiny_image, tiny_mask, tiny_unet2d_condition


def unet(channels: int = 3, size: int = 16, **settings: Any) -> UNet2DModel:
    """A U-Net without text, ``size``×``size``."""
    return UNet2DModel(**{
        "sample_size": size, "in_channels": channels, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), **settings,
    })


def vq() -> VQModel:
    return VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3,
        norm_num_groups=4, layers_per_block=1, num_vq_embeddings=32,
    )


@case("unconditional")
def DDPMPipeline() -> Any:
    return assemble("DDPMPipeline", unet=unet(), scheduler=DDPMScheduler())


@case("unconditional")
def DDIMPipeline() -> Any:
    return assemble("DDIMPipeline", unet=unet(), scheduler=DDIMScheduler())


@case("class-to-image", class_labels=3)
def ConsistencyModelPipeline() -> Any:
    backbone = unet(num_class_embeds=10, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4)
    return assemble("ConsistencyModelPipeline", unet=backbone, scheduler=CMStochasticIterativeScheduler())


@case("class-to-image", class_labels=[1])
def DiTPipeline() -> Any:
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    )
    return assemble("DiTPipeline", transformer=transformer, vae=tiny_autoencoder_kl(), scheduler=DDIMScheduler(clip_sample=False))


@case("text-to-image", prompt=PROMPT, height=64, width=64)
def LDMTextToImagePipeline() -> Any:
    return assemble(
        "LDMTextToImagePipeline", vqvae=tiny_autoencoder_kl(), bert=tiny_clip_text(length=77), tokenizer=tiny_clip_tokenizer(77),
        unet=tiny_unet2d_condition(), scheduler=vp_scheduler(),
    )


@case("super-resolution", image=lambda: tiny_image(32))
def LDMSuperResolutionPipeline() -> Any:
    """Sizes are multiples of 32; the U-Net sees the small image beside latents of its size."""
    return assemble("LDMSuperResolutionPipeline", vqvae=vq(), unet=unet(6, 32), scheduler=DDIMScheduler())


# Deprecated ones


@case("unconditional")
def LDMPipeline() -> Any:
    return assemble("LDMPipeline", vqvae=vq(), unet=unet(3, 8), scheduler=DDIMScheduler())


@case("unconditional")
def PNDMPipeline() -> Any:
    return assemble("PNDMPipeline", unet=unet(), scheduler=PNDMScheduler())


@case("unconditional")
def ScoreSdeVePipeline() -> Any:
    return assemble("ScoreSdeVePipeline", unet=unet(time_embedding_type="fourier"), scheduler=ScoreSdeVeScheduler())


@case("unconditional")
def KarrasVePipeline() -> Any:
    return assemble("KarrasVePipeline", unet=unet(), scheduler=KarrasVeScheduler())


@case("inpainting", image=lambda: tiny_image(32), mask_image=lambda: tiny_mask(32), jump_length=1, jump_n_sample=1)
def RePaintPipeline() -> Any:
    return assemble("RePaintPipeline", unet=unet(size=32), scheduler=RePaintScheduler())


@case("audio", audio_length_in_s=0.01)
def DanceDiffusionPipeline() -> Any:
    backbone = UNet1DModel(
        sample_size=64, sample_rate=16000, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32, 32), layers_per_block=1,
        flip_sin_to_cos=True, use_timestep_embedding=False, time_embedding_type="fourier", mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"), up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    return assemble("DanceDiffusionPipeline", unet=backbone, scheduler=IPNDMScheduler())
