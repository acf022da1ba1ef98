"""Sound from transformers: Stable Audio, Stable Audio 3, LongCat-AudioDiT, ACE-Step. Samples are a few hundred numbers long."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from zoo.core import tensor, tiny_t5, tiny_t5_tokenizer
from zoo.parts import bytes_tokenizer, family, flow, inputs, language_model

BOTH = "prompt negative_prompt"


def oobleck(channels: int) -> Any:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=channels, audio_channels=2, channel_multiples=[2, 4],
        sampling_rate=4,
    )


def stable_audio(name: str) -> dict[str, Any]:
    """Without the scheduler of the published one, which draws its noise with torchsde."""
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=3, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_attention_heads=2, out_channels=3,
        cross_attention_dim=16, time_proj_dim=16, global_states_input_dim=32, cross_attention_input_dim=16,
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential")
    projection = diffusers.StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32)
    return dict(
        vae=oobleck(3), text_encoder=tiny_t5(), projection_model=projection, tokenizer=tiny_t5_tokenizer(), transformer=transformer, scheduler=scheduler,
    )


family(stable_audio, StableAudioPipeline=("audio", inputs(BOTH, audio_end_in_s=4.0)))


def stable_audio_3(name: str) -> dict[str, Any]:
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8, patch_size=1, embed_dim=32, depth=1, num_heads=2, cond_token_dim=16, global_cond_dim=16, local_add_cond_dim=9, timestep_features_dim=16,
        ff_mult=2, num_memory_tokens=3, use_differential_attention=False,
    )
    vae = diffusers.AutoencoderSAME(
        audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,), encoder_transformer_depths=(1,), latent_dim=8,
        use_differential_attention=False, dim_heads=4, ff_mult=2, sampling_rate=16,
    )
    module = transformers.T5GemmaModuleConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=64, sliding_window=64, layer_types=["full_attention"],
    ).to_dict()
    text = transformers.T5GemmaEncoderModel(transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False))
    duration = diffusers.pipelines.stable_audio_3.StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16)
    return dict(
        vae=vae, text_encoder=text, tokenizer=bytes_tokenizer(), duration_embedder=duration, transformer=transformer,
        scheduler=flow(num_train_timesteps=1, shift=1.0),
    )


AUDIO = dict(audio=lambda: tensor(1, 2, 32).tanh(), duration=2.0)
family(
    stable_audio_3,
    StableAudio3Pipeline=("audio", inputs(BOTH, duration=2.0)),
    StableAudio3AudioToAudioPipeline=("audio", inputs("prompt", **AUDIO, init_noise_level=0.7)),
    StableAudio3InpaintPipeline=("audio", inputs("prompt", **AUDIO, mask_start_seconds=0.5, mask_end_seconds=1.5)),
)


def longcat_audio(name: str) -> dict[str, Any]:
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=32, vocab_size=300))
    transformer = diffusers.LongCatAudioDiTTransformer(dit_dim=32, dit_depth=1, dit_heads=2, dit_text_dim=16, latent_dim=8, text_conv=False)
    vae = diffusers.LongCatAudioDiTVae(
        in_channels=1, channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16, downsampling_ratio=2, sample_rate=240,
    )
    return dict(vae=vae, text_encoder=text, tokenizer=bytes_tokenizer(), transformer=transformer)


family(longcat_audio, LongCatAudioDiTPipeline=("audio", inputs(BOTH, audio_duration_s=0.2)))


def ace_step(name: str) -> dict[str, Any]:
    """Prompt, lyrics and timbre are encoded by a network of its own."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8, rope_theta=10000.0, sliding_window=16)
    transformer = diffusers.AceStepTransformer1DModel(**sizes, num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2)
    condition = diffusers.pipelines.ace_step.AceStepConditionEncoder(
        **sizes, text_hidden_dim=16, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1,
    )
    return dict(
        vae=oobleck(8), text_encoder=language_model(), tokenizer=bytes_tokenizer(512), transformer=transformer, condition_encoder=condition,
        scheduler=flow(num_train_timesteps=1, shift=1.0),
    )


family(ace_step, AceStepPipeline=("audio", inputs("prompt", lyrics="[verse]\nred", audio_duration=8.0, max_lyric_length=32)))
