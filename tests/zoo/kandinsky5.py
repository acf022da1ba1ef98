"""Kandinsky 5 (images and videos) and 6 (videos with sound, and their enlargement); a Qwen-VL and a CLIP read the prompt."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo.core import tensor, tiny_autoencoder_kl, tiny_clip_text, tiny_clip_tokenizer
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
    Kandinsky5I2VPipeline=("image-to-video", inputs(BOTH + " image", **{**VIDEO, "num_frames": 21})),
    # the first four latent frames follow the others' statistics
)


def kandinsky6(name: str) -> dict[str, Any]:
    """Video and sound have a stream each."""
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, patch_size=(1, 2, 2), model_dim=32, ff_dim=32, num_text_blocks=1,
        num_visual_blocks=1, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=4, out_audio_dim=4, model_dim_a=32, time_dim_a=16, ff_dim_a=32,
        axes_dims_a=(16,),
        visual_token_type_num_embeddings=2,
    )
    audio = diffusers.MMAudioVAE(
        mel_bins=8, latent_channels=4, hidden_channels=32, channel_multipliers=(1, 2), layers_per_block=1, sample_rate=800, n_fft=64, hop_length=16,
    )
    vocoder = diffusers.MMAudioVocoder(
        num_mels=8, upsample_initial_channel=16, upsample_rates=(4, 4), upsample_kernel_sizes=(8, 8), resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3, 5),),
    )
    return dict(
        transformer=transformer, vae=hunyuan_video_vae(), text_encoder=qwen_vl(), tokenizer=qwen_processor(), text_encoder_2=tiny_clip_text(length=77),
        tokenizer_2=tiny_clip_tokenizer(77), scheduler=flow(shift=5.0), audio_vae=audio, vocoder=vocoder,
    )


family(kandinsky6, Kandinsky6TI2VAPipeline=("text-to-video", inputs(BOTH, **VIDEO, max_sequence_length=256)))


def kandinsky6_sr(name: str) -> dict[str, Any]:
    """Enlarges a video, tile by tile."""
    transformer = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=4, time_dim=16, patch_size=(1, 1, 1), model_dim=32, ff_dim=32, num_visual_blocks=1, axes_dims=(4, 6, 6),
        tile_sizes=((128, 128),),
    )
    vae = diffusers.Kandinsky6SRVAE(
        latent_channels=4, encoder_block_out_channels=(8,) * 5, decoder_block_out_channels=(8,) * 5, layers_per_block=1,
    )
    return dict(transformer=transformer, vae=vae, scheduler=flow())


family(kandinsky6_sr, Kandinsky6SRPipeline=("super-resolution", inputs("", video=lambda: tensor(1, 5, 3, 64, 64).sigmoid(), resolution_scale=2.0)))
