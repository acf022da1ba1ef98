"""DeepFloyd IF: pixels, T5, and a cascade of U-Nets that also predict the variance."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler

from zoo.core import PROMPT, add, assemble, tiny_image, tiny_mask, tiny_t5, tiny_t5_tokenizer, tiny_unet2d_condition


def parts(super_resolution: bool) -> dict[str, Any]:
    """A stage: 16×16 from noise, or from a smaller image beside the noise."""
    unet = {
        "sample_size": 16, "out_channels": 6, "encoder_hid_dim": 16, "attention_head_dim": 8, "block_out_channels": (32, 32), "act_fn": "gelu", 
        "cross_attention_norm": "group_norm", "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "addition_embed_type": "text", "addition_embed_type_num_heads": 2,
        "resnet_time_scale_shift": "scale_shift", **({"in_channels": 6, "class_embed_type": "timestep"} if super_resolution else {}),
    }
    return {
        "text_encoder": tiny_t5(), "tokenizer": tiny_t5_tokenizer(), "unet": tiny_unet2d_condition(3, 32, **unet),
        "scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, sample_max_value=1.0),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


TEXT = {"prompt": PROMPT}
SMALL = {"image": lambda: tiny_image(8)}
ORIGINAL = {"original_image": lambda: tiny_image(16, seed=1)}
MASK = {"mask_image": lambda: tiny_mask()}

for _name, _task, _call in (
    ("IFPipeline", "text-to-image", {"height": 16, "width": 16}),
    ("IFImg2ImgPipeline", "image-to-image", {"image": lambda: tiny_image()}),
    ("IFInpaintingPipeline", "inpainting", {"image": lambda: tiny_image(), **MASK}),
    ("IFSuperResolutionPipeline", "super-resolution", {**SMALL, "height": 16, "width": 16}),
    ("IFImg2ImgSuperResolutionPipeline", "super-resolution", {**SMALL, **ORIGINAL}),
    ("IFInpaintingSuperResolutionPipeline", "super-resolution", {**SMALL, **ORIGINAL, **MASK}),
):
    add(_name, _task, lambda name=_name: assemble(name, **parts("SuperResolution" in name)), **TEXT, **_call)
