"""Kandinsky 5: images and videos; a Qwen-VL and a CLIP read the prompt."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import tiny_autoencoder_kl, tiny_clip_text, tiny_clip_tokenizer
from zoo.parts import family, flow, hunyuan_video_vae, inputs, qwen_processor, qwen_vl


def kandinsky5(name: str) -> dict[str, Any]:
    """Image-conditioned networks read the latents, those of the picture and a mask."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2), model_dim=32, ff_dim=32, num_text_blocks=1,
        num_visual_blocks=1, axes_dims=(4, 6, 6), visual_cond="I2" in name,
    )
    image = name.endswith("2IPipeline")
    vae = tiny_autoencoder_kl(channels=(8,) * 4, use_quant_conv=False, use_post_quant_conv=False) if image else hunyuan_video_vae()
    return dict(
        transformer=transformer, vae=vae, text_encoder=qwen_vl(), tokenizer=qwen_processor(), text_encoder_2=tiny_clip_text(length=77),
        tokenizer_2=tiny_clip_tokenizer(77), scheduler=flow(shift=7.0),
    )


BOTH = "prompt negative_prompt"
VIDEO = dict(height=32, width=32, num_frames=9)
family(
    kandinsky5,
    Kandinsky5T2IPipeline=("text-to-image", inputs(BOTH, height=64, width=64)),
    Kandinsky5I2IPipeline=("image-to-image", inputs(BOTH + " image", height=64, width=64)),
    Kandinsky5T2VPipeline=("text-to-video", inputs(BOTH, **VIDEO)),
    Kandinsky5I2VPipeline=("image-to-video", inputs(BOTH + " image", **{**VIDEO, "num_frames": 21})),  # the first four latent frames follow the others' statistics
)
