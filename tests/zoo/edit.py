"""Pipelines that edit or refine pictures: JoyImage, the HunyuanImage refiner, and Fibo 2, which draws too."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import tiny_image
from zoo.image import flux2_vae
from zoo.parts import bytes_tokenizer, family, flow, inputs, qwen_processor, qwen_vl, wan_vae

BOTH = "prompt negative_prompt"


def joy(name: str) -> dict[str, Any]:
    """Pictures are rescaled to a megapixel: the autoencoder shrinks them 32×, so that 256 tokens are left."""
    cls = diffusers.JoyImageEditPlusTransformer3DModel if "Plus" in name else diffusers.JoyImageEditTransformer3DModel
    transformer = cls(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=1, rope_dim_list=[4, 6, 6], theta=256,
    )
    processor = qwen_processor(3)
    vae = wan_vae(patch_size=8, in_channels=192, out_channels=192, dim_mult=[1, 1, 1], temperal_downsample=[False, True], scale_factor_spatial=32)
    return dict(
        scheduler=flow(), vae=vae, text_encoder=qwen_vl(16, "Qwen3VLForConditionalGeneration"), tokenizer=processor.tokenizer,
        transformer=transformer, processor=processor,
    )


family(
    joy,
    JoyImageEditPipeline=("image-to-image", inputs(BOTH + " image", height=32, width=32)),
    JoyImageEditPlusPipeline=("image-to-image", inputs(BOTH, images=lambda: [tiny_image(32), tiny_image(32, 1)], height=128, width=128)),
)


def refiner(name: str) -> dict[str, Any]:
    """Latents of a picture, drawn again from a little noise; embedded guidance."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        patch_size=(1, 1, 1), guidance_embeds=True, text_embed_dim=16, rope_axes_dim=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=2, block_out_channels=(8,) * 5, layers_per_block=1, spatial_compression_ratio=16, temporal_compression_ratio=4,
    )
    return dict(scheduler=flow(shift=4.0), vae=vae, text_encoder=qwen_vl(), tokenizer=bytes_tokenizer(4096), transformer=transformer)


family(refiner, HunyuanImageRefinerPipeline=("image-to-image", inputs("prompt image", height=64, width=64)))


def fibo2(name: str) -> dict[str, Any]:
    """Bundles of three layers of the text encoder: the first is the text, each other is added at a block."""
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=48, injection_layer_ids=(0,),
        perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=16, gist_max_text_len=64, axes_dims=(8, 4, 4),
        axes_lens=(512, 64, 64),
    )
    return dict(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=True), vae=flux2_vae(), text_encoder=qwen_vl(16, "Qwen3VLForConditionalGeneration"),
        processor=qwen_processor(3),
    )


family(fibo2, BriaFibo2Pipeline=("text-to-image", inputs(BOTH, height=16, width=16)))
