"""Kandinsky 1, 2.2 and 3, unCLIP: a prior from text to an image embedding, a decoder from there to pixels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, Kandinsky3UNet, PriorTransformer, UnCLIPScheduler, UNet2DModel, VQModel

from zoo.core import (
    PROMPT,
    SQUARE,
    TEXT,
    add,
    assemble,
    tensor,
    tiny_clip_images,
    tiny_clip_text,
    tiny_clip_tokenizer,
    tiny_clip_vision,
    tiny_image,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_unet2d_condition,
)

EMBEDS = {"image_embeds": lambda: tensor(1, 16), "negative_image_embeds": lambda: tensor(1, 16, seed=1)}
IMAGE = {"image": lambda: tiny_image(), "strength": 0.8}
PAINT = {"image": lambda: tiny_image(), "mask_image": lambda: half()}
HINT = {"hint": lambda: tensor(1, 3, 64, 64)}
TWO_STAGES = {"prior_num_inference_steps": 2}


def half() -> Any:
    """A mask whose left half is one."""
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    return mask.numpy()


def movq() -> VQModel:
    """Images of twice the latents' size; its decoder sees the latents at every level."""
    return VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), latent_channels=4, layers_per_block=1,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), norm_num_groups=4, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )


def decoder(**unet: Any) -> dict[str, Any]:
    """From an image embedding to latents: mean and variance."""
    settings = {
        "out_channels": 8, "block_out_channels": (32, 32), "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "encoder_hid_dim": 16, "resnet_time_scale_shift": "scale_shift", **unet,
    }
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
    scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return {"unet": tiny_unet2d_condition(**settings), "movq": movq(), "scheduler": scheduler}


def prior() -> dict[str, Any]:
    """From text to an image embedding. The image encoder gives the embedding of an empty image."""
    network = PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=16)
    network.clip_std = torch.nn.Parameter(torch.ones_like(network.clip_std))
    return {
        "prior": network, "image_encoder": tiny_clip_vision(), "text_encoder": tiny_clip_text(projection=16), "tokenizer": tiny_clip_tokenizer(),
        "scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0),
        "image_processor": tiny_clip_images(),
    }


def _first(channels: int = 4) -> dict[str, Any]:
    """Kandinsky 1: the decoder sees text and image."""
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    words = tiny_clip_tokenizer(77)
    config = MCLIPConfig(
        numDims=16, transformerDimensions=16, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=len(words),
        pad_token_id=words.pad_token_id,
    )
    unet = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj", "in_channels": channels}
    return {**decoder(**unet), "tokenizer": words, "text_encoder": MultilingualCLIP(config)}


def _second(channels: int = 4, hint: bool = False) -> dict[str, Any]:
    """Kandinsky 2.2: the decoder sees the image embedding alone."""
    return decoder(addition_embed_type="image_hint" if hint else "image", encoder_hid_dim_type="image_proj", in_channels=channels)


def _combined(name: str, parts: dict[str, Any]) -> Any:
    return assemble(name, **parts, **{f"prior_{k}": v for k, v in prior().items()})


for _name, _task, _channels, _call in (
    ("KandinskyPipeline", "text-to-image", 4, {**TEXT, **EMBEDS}),
    ("KandinskyImg2ImgPipeline", "image-to-image", 4, {**TEXT, **EMBEDS, **IMAGE}),
    ("KandinskyInpaintPipeline", "inpainting", 9, {**TEXT, **EMBEDS, **PAINT}),
):
    add(_name, _task, lambda name=_name, channels=_channels: assemble(name, **_first(channels)), **_call)

for _name, _task, _channels, _call in (
    ("KandinskyCombinedPipeline", "text-to-image", 4, TEXT),
    ("KandinskyImg2ImgCombinedPipeline", "image-to-image", 4, {**TEXT, **IMAGE}),
    ("KandinskyInpaintCombinedPipeline", "inpainting", 9, {**TEXT, **PAINT}),
):
    add(_name, _task, lambda name=_name, channels=_channels: _combined(name, _first(channels)), **_call, **TWO_STAGES)

for _name, _task, _settings, _call in (
    ("KandinskyV22Pipeline", "other", {}, {**EMBEDS, **SQUARE}),
    ("KandinskyV22Img2ImgPipeline", "image-to-image", {}, {**EMBEDS, **SQUARE, **IMAGE}),
    ("KandinskyV22InpaintPipeline", "inpainting", {"channels": 9}, {**EMBEDS, **SQUARE, **PAINT}),
    ("KandinskyV22ControlnetPipeline", "control", {"channels": 8, "hint": True}, {**EMBEDS, **SQUARE, **HINT}),
    ("KandinskyV22ControlnetImg2ImgPipeline", "control", {"channels": 8, "hint": True}, {**EMBEDS, **SQUARE, **HINT, **IMAGE}),
):
    add(_name, _task, lambda name=_name, settings=_settings: assemble(name, **_second(**settings)), **_call)

for _name, _task, _settings, _call in (
    ("KandinskyV22CombinedPipeline", "text-to-image", {}, TEXT),
    ("KandinskyV22Img2ImgCombinedPipeline", "image-to-image", {}, {**TEXT, **IMAGE}),
    ("KandinskyV22InpaintCombinedPipeline", "inpainting", {"channels": 9}, {**TEXT, **PAINT}),
):
    add(_name, _task, lambda name=_name, settings=_settings: _combined(name, _second(**settings)), **_call, **TWO_STAGES)

for _name, _call in (
    ("KandinskyPriorPipeline", {}),
    ("KandinskyV22PriorPipeline", {}),
    ("KandinskyV22PriorEmb2EmbPipeline", {"image": lambda: tensor(1, 16), "strength": 0.8}),
):
    add(_name, "other", lambda name=_name: assemble(name, **prior()), prompt=PROMPT, **_call)


def _third() -> dict[str, Any]:
    """Kandinsky 3: a U-Net of its own, T5, no prior."""
    return {
        "unet": Kandinsky3UNet(
            in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=2, block_out_channels=(16, 32), cross_attention_dim=8,
            encoder_hid_dim=16,
        ),
        "scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, steps_offset=1),
        "movq": movq(), "text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer(),
    }


add("Kandinsky3Pipeline", "text-to-image", lambda: assemble("Kandinsky3Pipeline", **_third()), **TEXT)
add("Kandinsky3Img2ImgPipeline", "image-to-image", lambda: assemble("Kandinsky3Img2ImgPipeline", **_third()), prompt=PROMPT, **IMAGE)


def _unclip() -> dict[str, Any]:
    """unCLIP (deprecated): a prior, a decoder and two U-Nets that enlarge, each with a scheduler of its own."""
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    def enlarge(size: int) -> UNet2DModel:
        return UNet2DModel(
            sample_size=size, in_channels=6, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
        )

    parts = prior()
    unet = decoder(sample_size=8, in_channels=3, out_channels=6, encoder_hid_dim=None, class_embed_type="identity")["unet"]
    return {
        **parts, "prior_scheduler": parts["scheduler"], "feature_extractor": parts["image_processor"], "decoder": unet,
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=16, time_embed_dim=4 * 32, cross_attention_dim=16),
        "super_res_first": enlarge(16), "super_res_last": enlarge(16),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }


STAGES = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
add("UnCLIPPipeline", "text-to-image", lambda: assemble("UnCLIPPipeline", **_unclip()), prompt=PROMPT, **TWO_STAGES, **STAGES)
add(
    "UnCLIPImageVariationPipeline", "image-to-image", lambda: assemble("UnCLIPImageVariationPipeline", **_unclip()), image=lambda: tiny_image(), **STAGES,
)
