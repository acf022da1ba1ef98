"""Tiny pipelines with random weights: seconds on a CPU, no network."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel

from distill.loading import shipped_pipeline

WORDS = ["a", "red", "green", "blue", "apple", "car", "photograph", "cat", "of"]


def vp_scheduler(prediction_type: str = "epsilon", zero_snr: bool = False, cls: Any = DDIMScheduler, **settings: Any) -> Any:
    """A diffusers scheduler on Stable Diffusion's schedule."""
    return cls(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        **({"rescale_betas_zero_snr": True} if zero_snr else {}),
        **({"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} if cls is DDIMScheduler else {}), **settings,
    )


def unet2d(classes: int | None = 10, seed: int = 0, dropout: float = 0.0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=None if classes is None else classes + 1, dropout=dropout,
    )


def tiny_unet2d(classes: int | None = 10, prediction_type: str = "v_prediction", zero_snr: bool = True) -> Any:
    """A class-conditional (or unconditional) pixel-space pipeline, 8×8."""
    scheduler = vp_scheduler(prediction_type, zero_snr, timestep_spacing="trailing" if zero_snr else "leading")
    pipeline = shipped_pipeline("UNet2DPipeline")(unet2d(classes), scheduler, num_inference_steps=4, null_class=classes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenizer() -> Any:
    """A real CLIP tokenizer over a handful of words."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges, vocabulary = [], [*letters, *(letter + "</w>" for letter in letters)]
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary.append(parts[0])
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def tiny_stable_diffusion(prediction_type: str = "epsilon", zero_snr: bool = False, scheduler: Any = None, cls: Any = StableDiffusionPipeline) -> Any:
    """A StableDiffusionPipeline: 16×16 images, 8×8×4 latents."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id,
    ))
    pipeline = cls(
        vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=scheduler or vp_scheduler(prediction_type, zero_snr), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_text(words: Any, width: int = 16, projection: bool = False) -> Any:
    """A CLIP text encoder for the tokenizer above."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id, projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def latent_vae(channels: int = 4) -> AutoencoderKL:
    """Images of twice the latents' size."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=None if channels == 4 else 0.06,
    )


def tiny_sd3(shift: float = 3.0, seed: int = 0) -> Any:
    """A StableDiffusion3Pipeline without the third text encoder: flow matching, 16×16 images, 8×8×16 latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    words = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, out_channels=16, pos_embed_max_size=8,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=latent_vae(16), text_encoder=clip_text(words, projection=True),
        tokenizer=words, text_encoder_2=clip_text(words, projection=True), tokenizer_2=words, text_encoder_3=None, tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_transformer(seed: int = 0, guidance: bool = False) -> Any:
    """A FluxTransformer2DModel of two double and two single blocks."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )


def tiny_flux(shift: float = 1.0, seed: int = 0) -> Any:
    """A FluxPipeline: packed latents, 16×16 images. Call it with ``max_sequence_length=16``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import T5Config, T5EncoderModel

    transformer, words = flux_transformer(seed), tokenizer()
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    pipeline = FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=latent_vae(1), text_encoder=clip_text(words),
        tokenizer=words, text_encoder_2=t5, tokenizer_2=words,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_dit(seed: int = 0) -> Any:
    """A DiTPipeline: class-conditional, learned variance, 16×16 images."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )
    pipeline = DiTPipeline(transformer=transformer, vae=latent_vae(), scheduler=vp_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_student(pipeline: Any, times: Any = None, steps: int = 4, lora: Any = None, call: Any = None, **sampler: Any) -> Any:
    """A student of the pipeline, as if trained: on an even ladder, unless times are given."""
    from distill.roles import build_roles
    from distill.sampling import Sampler, uniform_ladder
    from distill.student import Student
    from distill.teacher import Teacher

    teacher = Teacher(pipeline, call) if call else Teacher(pipeline)
    roles, adapters = build_roles(teacher, ["student", "critic"], lora, 32 if "guidance_range" in sampler else 0)
    perturb(roles.parameters("student"), 0.02)
    perturb(roles.parameters("critic"), 0.3, seed=5)
    return Student(teacher, roles.student, Sampler(uniform_ladder(steps) if times is None else times, steps, **sampler), adapters)  # type: ignore[arg-type]


def perturb(parameters: Any, scale: float = 0.05, seed: int = 1) -> None:
    """Random changes, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator))

