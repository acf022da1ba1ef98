"""Deprecated pipelines that no other family holds: images by example, by two prompts; text and image at once."""

from __future__ import annotations

from typing import Any

from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

from zoo.core import (
    add,
    assemble,
    case,
    tiny_clip_images,
    tiny_clip_text,
    tiny_clip_tokenizer,
    tiny_clip_vision,
    tiny_image,
    tiny_mask,
)
from zoo.stable_diffusion import SQUARE, TEXT, parts


@case("inpainting", example_image=lambda: tiny_image(seed=1), image=lambda: tiny_image(), mask_image=lambda: tiny_mask(), **SQUARE)
def PaintByExamplePipeline() -> Any:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    config = tiny_clip_vision().config
    config.num_hidden_layers = 4  # one layer in five is a mapper
    return assemble("PaintByExamplePipeline", **{**parts(in_channels=9), "image_encoder": PaintByExampleImageEncoder(config, proj_size=16)})


@case("image-to-video", **TEXT, image=lambda: tiny_image(), num_frames=2, clip_skip=None)
def I2VGenXLPipeline() -> Any:
    unet = I2VGenXLUNet(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return assemble("I2VGenXLPipeline", **{**parts(), "unet": unet})


def _versatile() -> dict[str, Any]:
    """Versatile Diffusion without its second U-Net, whose attention layers would only be swapped into the first."""
    shared = parts()
    return {
        **shared, "text_encoder": tiny_clip_text(projection=16), "image_unet": shared["unet"], "image_feature_extractor": tiny_clip_images(),
        "tokenizer": tiny_clip_tokenizer(),
    }


for _name, _task, _call in (
    ("VersatileDiffusionTextToImagePipeline", "text-to-image", TEXT),
    ("VersatileDiffusionImageVariationPipeline", "image-to-image", {"image": lambda: tiny_image(), **SQUARE}),
):
    add(_name, _task, lambda name=_name: assemble(name, **_versatile()), **_call)


@case("text-to-image", **TEXT)
def UniDiffuserPipeline() -> Any:
    """Noise in three parts: latents of the autoencoder, an image embedding, text embeddings."""
    from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel, UniDiffuserTextDecoder

    words = tiny_clip_tokenizer()
    unet = UniDiffuserModel(
        text_dim=16, clip_img_dim=16, num_text_tokens=16, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, activation_fn="gelu", attention_bias=True, use_timestep_embedding=False,
    )
    decoder = UniDiffuserTextDecoder(prefix_length=16, prefix_inner_dim=16, vocab_size=len(words), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    return assemble("UniDiffuserPipeline", **{
        **parts(), "unet": unet, "clip_image_processor": tiny_clip_images(), "clip_tokenizer": words, "text_decoder": decoder, "text_tokenizer": words,
    })
