"""Transformers on an image autoencoder's latents: PixArt, Hunyuan-DiT, Latte and Allegro (videos), Sana."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    AllegroTransformer3DModel,
    AutoencoderDC,
    AutoencoderKLAllegro,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SCMScheduler,
)

from zoo.core import (
    PROMPT,
    add,
    assemble,
    case,
    tiny_autoencoder_kl,
    tiny_bert,
    tiny_bert_tokenizer,
    tiny_gemma2,
    tiny_gemma_tokenizer,
    tiny_image,
    tiny_t5,
    tiny_t5_tokenizer,
)

SQUARE = {"height": 16, "width": 16, "use_resolution_binning": False}
TEXT = {"prompt": PROMPT, **SQUARE}
LENGTH = {"max_sequence_length": 16}


# PixArt


def pixart() -> dict[str, Any]:
    """T5, a transformer that also predicts the variance."""
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16, in_channels=4, cross_attention_dim=16,
        out_channels=8,
    )
    return {
        "transformer": transformer, "vae": tiny_autoencoder_kl(), "scheduler": DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02),
        "text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer(),
    }


for _name, _call in (("PixArtAlphaPipeline", {}), ("PixArtSigmaPipeline", {}), ("PixArtSigmaPAGPipeline", {"pag_scale": 3.0})):
    add(_name, "text-to-image", lambda name=_name: assemble(name, **pixart()), **TEXT, **LENGTH, clean_caption=False, **_call)


@case("text-to-video", prompt=PROMPT, height=16, width=16, video_length=2, clean_caption=False)
def LattePipeline() -> Any:
    transformer = LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16, in_channels=4, cross_attention_dim=16,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
    )
    return assemble("LattePipeline", **{**pixart(), "transformer": transformer, "scheduler": DDIMScheduler(clip_sample=False)})


@case("text-to-video", prompt=PROMPT, height=16, width=16, num_frames=8, clean_caption=False, **LENGTH)
def AllegroPipeline() -> Any:
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=24, sample_width=8, sample_height=8,
        sample_frames=8, caption_channels=16,
    )
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8,) * 4, latent_channels=4,
        layers_per_block=1, norm_num_groups=2,
    )
    vae.enable_tiling()  # it decodes in tiles only: one here
    vae.kernel = vae.stride = (8, 16, 16)
    return assemble("AllegroPipeline", **{**pixart(), "transformer": transformer, "vae": vae, "scheduler": EulerAncestralDiscreteScheduler()})


# Hunyuan-DiT


def hunyuan() -> dict[str, Any]:
    """BERT and T5."""
    transformer = HunyuanDiT2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, hidden_size=16, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=16, activation_fn="gelu-approximate", text_len=77, text_len_t5=256,
    )
    return {
        "transformer": transformer, "vae": tiny_autoencoder_kl(), "scheduler": DDPMScheduler(beta_end=0.03, prediction_type="v_prediction", steps_offset=1),
        "text_encoder": tiny_bert(), "tokenizer": tiny_bert_tokenizer(77), "text_encoder_2": tiny_t5(), "tokenizer_2": tiny_t5_tokenizer(256),
    }


add("HunyuanDiTPipeline", "text-to-image", lambda: assemble("HunyuanDiTPipeline", **hunyuan()), **TEXT)
add("HunyuanDiTPAGPipeline", "text-to-image", lambda: assemble("HunyuanDiTPAGPipeline", **hunyuan()), **TEXT, pag_scale=3.0)


@case("control", **TEXT, control_image=lambda: tiny_image())
def HunyuanDiTControlNetPipeline() -> Any:
    shared = hunyuan()
    wanted = inspect.signature(HunyuanDiT2DControlNetModel).parameters
    settings = {k: v for k, v in shared["transformer"].config.items() if k in wanted}
    net = HunyuanDiT2DControlNetModel(**settings, transformer_num_layers=4)
    return assemble("HunyuanDiTControlNetPipeline", **shared, controlnet=net)


# Sana

LARGER = {**TEXT, "height": 32, "width": 32}
GEMMA = {"complex_human_instruction": None, "clean_caption": False, **LENGTH}
SPRINT = {"intermediate_timesteps": None}  # for any number of steps


def sana(sprint: bool = False) -> dict[str, Any]:
    """Gemma, linear attention, an autoencoder that compresses more (here: twice); Sprint is TrigFlow with the guidance among the inputs."""
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=16,
        **({"qk_norm": "rms_norm_across_heads", "guidance_embeds": True} if sprint else {}),
    )
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_layers_per_block=(1, 1),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_layers_per_block=(1, 1), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )
    return {
        "transformer": transformer, "vae": vae, "text_encoder": tiny_gemma2(), "tokenizer": tiny_gemma_tokenizer(),
        "scheduler": SCMScheduler() if sprint else DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


add("SanaPipeline", "text-to-image", lambda: assemble("SanaPipeline", **sana()), **LARGER, **GEMMA)
add("SanaSprintPipeline", "text-to-image", lambda: assemble("SanaSprintPipeline", **sana(sprint=True)), **LARGER, **GEMMA, **SPRINT)
add(
    "SanaSprintImg2ImgPipeline", "image-to-image", lambda: assemble("SanaSprintImg2ImgPipeline", **sana(sprint=True)), **LARGER, **GEMMA,
    **SPRINT, image=lambda: tiny_image(32), strength=0.8,
)


@case("text-to-image", **LARGER, **GEMMA, pag_scale=2.0)
def SanaPAGPipeline() -> Any:
    return assemble("SanaPAGPipeline", **{**sana(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})


@case("control", **LARGER, **GEMMA, control_image=lambda: tiny_image(32))
def SanaControlNetPipeline() -> Any:
    shared = sana()
    wanted = inspect.signature(SanaControlNetModel).parameters
    settings = {k: v for k, v in shared["transformer"].config.items() if k in wanted}
    net = SanaControlNetModel(**{**settings, "num_layers": 1})
    return assemble("SanaControlNetPipeline", **shared, controlnet=net)
