"""Marigold (depth, normals, materials of an image) and Shap-E (objects in three dimensions)."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import HeunDiscreteScheduler, PriorTransformer
from diffusers.pipelines.shap_e.renderer import ShapERenderer
from tiny import vp_scheduler

from zoo.core import PROMPT, add, assemble, case, tiny_clip_images, tiny_clip_text, tiny_clip_tokenizer, tiny_clip_vision, tiny_image
from zoo.stable_diffusion import parts

for _name, _targets in (("MarigoldDepthPipeline", 1), ("MarigoldNormalsPipeline", 1), ("MarigoldIntrinsicsPipeline", 2)):
    _channels = {"in_channels": 4 + 4 * _targets, "out_channels": 4 * _targets}
    add(
        _name, "image-to-image", lambda name=_name, channels=_channels: assemble(name, **parts(vp_scheduler("v_prediction"), **channels)),
        image=lambda: tiny_image(), processing_resolution=0,
    )


def _shap_e(tokens: int, **prior: Any) -> dict[str, Any]:
    """A prior over the weights of a small radiance field: 32 tokens of eight numbers."""
    renderer = ShapERenderer(param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=8, d_hidden=8, n_output=12, background=(0.1, 0.1, 0.1))
    renderer.decode_to_image = partial(renderer.decode_to_image, ray_batch_size=20 * 8 * 8, n_coarse_samples=4, n_fine_samples=4)  # all 20 views at once
    return {
        "prior": PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, embedding_dim=8, num_embeddings=32, embedding_proj_dim=16, time_embed_dim=32, num_layers=1,
            clip_embed_dim=16 * tokens, additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer", encoder_hid_proj_type=None,
            added_emb_type=None, **prior,
        ),
        "shap_e_renderer": renderer,
        "scheduler": HeunDiscreteScheduler(
            beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True, clip_sample=True, clip_sample_range=1.0,
        ),
    }


@case("3d", prompt=PROMPT, frame_size=8)
def ShapEPipeline() -> Any:
    return assemble("ShapEPipeline", **_shap_e(1), text_encoder=tiny_clip_text(projection=16), tokenizer=tiny_clip_tokenizer())


@case("3d", image=lambda: tiny_image(), frame_size=8)
def ShapEImg2ImgPipeline() -> Any:
    encoder = tiny_clip_vision(projection=None)
    return assemble("ShapEImg2ImgPipeline", **_shap_e(1, embedding_proj_norm_type="layer"), image_encoder=encoder, image_processor=tiny_clip_images())
