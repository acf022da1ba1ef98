"""Würstchen and Stable Cascade: a prior from text to a tiny image, a decoder from there to a VQGAN's latents."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMWuerstchenScheduler, StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior

from zoo.core import PROMPT, add, assemble, tensor, tiny_clip_images, tiny_clip_text, tiny_clip_tokenizer, tiny_clip_vision

TEXT = {"prompt": PROMPT, "height": 128, "width": 128}


def _vqgan() -> PaellaVQModel:
    return PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=16)


def cascade() -> dict[str, dict[str, Any]]:
    """Stable Cascade's stages: tokenizer, text encoder, network and scheduler of each."""
    text = {"text_encoder": tiny_clip_text(projection=16), "tokenizer": tiny_clip_tokenizer(), "scheduler": DDPMWuerstchenScheduler()}
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    attention = (*blocks, "SDCascadeAttnBlock")
    prior = StableCascadeUNet(
        in_channels=16, out_channels=16, conditioning_dim=32, block_out_channels=(32, 32), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1), block_types_per_layer=(attention, attention),
        switch_level=(False,), clip_image_in_channels=16, clip_text_in_channels=16, clip_text_pooled_in_channels=16, dropout=(0.1, 0.1),
    )
    decoder = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=32, block_out_channels=(16, 32), num_attention_heads=(-1, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1), block_types_per_layer=(blocks, attention),
        patch_size=2, effnet_in_channels=16, clip_text_pooled_in_channels=16, switch_level=None, dropout=(0.1, 0.1),
    )
    return {
        "prior": {**text, "prior": prior, "image_encoder": tiny_clip_vision(), "feature_extractor": tiny_clip_images()},
        "decoder": {**text, "decoder": decoder, "vqgan": _vqgan()},
    }


def wuerstchen() -> dict[str, dict[str, Any]]:
    """Würstchen's stages."""
    text = {"text_encoder": tiny_clip_text(), "tokenizer": tiny_clip_tokenizer(), "scheduler": DDPMWuerstchenScheduler()}
    decoder = WuerstchenDiffNeXt(c_cond=16, c_hidden=[32], nhead=[2], blocks=[2], level_config=["CTA"], clip_embd=16, inject_effnet=[False], effnet_embd=4)
    prior = WuerstchenPrior(c_in=4, c=16, depth=2, c_cond=16, c_r=8, nhead=2)
    prior.out[1].weight.normal_(std=0.005)  # its output is (x − a) / |1 − b|: anything larger explodes
    return {
        "prior": {**text, "prior": prior},
        "decoder": {**text, "decoder": decoder, "vqgan": _vqgan()},
    }


def _combined(name: str, stages: dict[str, dict[str, Any]]) -> Any:
    return assemble(name, **stages["decoder"], **{f"prior_{k}": v for k, v in stages["prior"].items()})


for _family, _stages, _channels in (("StableCascade", cascade, 16), ("Wuerstchen", wuerstchen, 4)):
    add(f"{_family}PriorPipeline", "other", lambda f=_family, s=_stages: assemble(f"{f}PriorPipeline", **s()["prior"]), **TEXT)
    add(
        f"{_family}DecoderPipeline", "other", lambda f=_family, s=_stages: assemble(f"{f}DecoderPipeline", **s()["decoder"]), prompt=PROMPT,
        image_embeddings=lambda channels=_channels: tensor(1, channels, 3, 3),
    )
    add(
        f"{_family}CombinedPipeline", "text-to-image", lambda f=_family, s=_stages: _combined(f"{f}CombinedPipeline", s()), **TEXT,
        prior_num_inference_steps=2,
    )
