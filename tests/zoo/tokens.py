"""Images of discrete tokens (aMUSEd, VQ-Diffusion): not diffusion of numbers, so that a teacher must refuse them."""

from __future__ import annotations

from typing import Any

from diffusers import AmusedScheduler, Transformer2DModel, UVit2DModel, VQDiffusionScheduler, VQModel

from zoo.core import PROMPT, add, assemble, case, tiny_clip_text, tiny_clip_tokenizer, tiny_image, tiny_mask


def amused() -> dict[str, Any]:
    """A masked transformer over a codebook of eight."""
    transformer = UVit2DModel(
        hidden_size=16, cond_embed_dim=16, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=16, vocab_size=32, codebook_size=8,
        in_channels=16, block_out_channels=16, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=2, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, layer_norm_eps=1e-6,
    )
    vqvae = VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=16,
        norm_num_groups=4, num_vq_embeddings=8, mid_block_add_attention=False, lookup_from_codebook=True,
    )
    return {
        "transformer": transformer, "vqvae": vqvae, "scheduler": AmusedScheduler(mask_token_id=31), "text_encoder": tiny_clip_text(projection=16),
        "tokenizer": tiny_clip_tokenizer(),
    }


for _name, _task, _call in (
    ("AmusedPipeline", "text-to-image", {"height": 16, "width": 16}),
    ("AmusedImg2ImgPipeline", "image-to-image", {"image": lambda: tiny_image()}),
    ("AmusedInpaintPipeline", "inpainting", {"image": lambda: tiny_image(), "mask_image": lambda: tiny_mask()}),
):
    add(_name, _task, lambda name=_name: assemble(name, **amused()), prompt=PROMPT, **_call)


@case("text-to-image", prompt=PROMPT)
def VQDiffusionPipeline() -> Any:
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import LearnedClassifierFreeSamplingEmbeddings

    vqvae = VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3,
        norm_num_groups=4, num_vq_embeddings=12, vq_embed_dim=3,
    )
    transformer = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_vector_embeds=13, num_embeds_ada_norm=12, sample_size=8, attention_bias=True,
        activation_fn="geglu-approximate", norm_num_groups=4, num_layers=1, norm_type="ada_norm",
    )
    return assemble(
        "VQDiffusionPipeline", vqvae=vqvae, transformer=transformer, scheduler=VQDiffusionScheduler(num_vec_classes=13, num_train_timesteps=12),
        text_encoder=tiny_clip_text(), tokenizer=tiny_clip_tokenizer(),
        learned_classifier_free_sampling_embeddings=LearnedClassifierFreeSamplingEmbeddings(learnable=True, hidden_size=16, length=16),
    )
