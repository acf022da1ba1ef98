"""Sounds: U-Nets on mel spectrograms and a vocoder."""

from __future__ import annotations

from typing import Any

from diffusers import AudioLDM2UNet2DConditionModel
from tiny import vp_scheduler

from zoo.core import PROMPT, assemble, case, tensor, tiny_autoencoder_kl, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_unet2d_condition

SOUND = {"prompt": PROMPT, "audio_length_in_s": 0.016}


def vocoder() -> Any:
    """From eight mel bins to a waveform, four samples each."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    network = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]], normalize_before=False,
    ))
    for p in network.parameters():  # its initial weights are so small that nothing is heard
        p.mul_(10)
    return network


def _text(projection: int) -> dict[str, Any]:
    words = tiny_clip_tokenizer()
    return {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": projection, "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
    }


def clap(projection: int = 16) -> Any:
    """Text and sound in one space."""
    from transformers import ClapConfig, ClapModel

    sound = {
        "spec_size": 8, "window_size": 4, "num_mel_bins": 8, "intermediate_size": 32, "depths": [1, 1], "num_attention_heads": [1, 1], "hidden_size": 32,
        "num_hidden_layers": 1, "projection_dim": projection, "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4,
        "patch_embeds_hidden_size": 16,
    }
    return ClapModel(ClapConfig(text_config=_text(projection), audio_config=sound, projection_dim=projection))


def parts(**unet: Any) -> dict[str, Any]:
    """The text enters as one vector, as a class does."""
    classes = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16, "class_embeddings_concat": True}
    return {
        "vae": tiny_autoencoder_kl(in_channels=1, out_channels=1), "tokenizer": tiny_clip_tokenizer(), "vocoder": vocoder(), "scheduler": vp_scheduler(),
        "unet": tiny_unet2d_condition(cross=None, **{**classes, **unet}),
    }


def sounds() -> Any:
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor(feature_size=8, hop_length=7900)


@case("audio", **SOUND)
def AudioLDMPipeline() -> Any:
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    return assemble("AudioLDMPipeline", **parts(cross_attention_dim=(16, 32)), text_encoder=ClapTextModelWithProjection(ClapTextConfig(**_text(16))))


def _roberta() -> Any:
    from transformers import RobertaTokenizer

    words = tiny_clip_tokenizer().get_vocab()
    special = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return RobertaTokenizer(vocab=words, merges=[], model_max_length=16, **special, cls_token="<|startoftext|>", sep_token="<|endoftext|>")


@case("audio", audio_length_in_s=0.016, prompt_embeds=lambda: tensor(1, 16), negative_prompt_embeds=lambda: tensor(1, 16, seed=1))
def MusicLDMPipeline() -> Any:
    """Embeddings instead of a prompt: what diffusers 0.42 does with the text encoder of transformers 5 fails."""
    return assemble("MusicLDMPipeline", **parts(cross_attention_dim=(16, 32)), text_encoder=clap(), feature_extractor=sounds())


@case("audio", **SOUND, max_new_tokens=4)
def AudioLDM2Pipeline() -> Any:
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel
    from transformers import GPT2Config, GPT2LMHeadModel

    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )
    return assemble(
        "AudioLDM2Pipeline", **{**parts(cross_attention_dim=(16, 32)), "unet": unet, "tokenizer": _roberta()}, text_encoder=clap(),
        text_encoder_2=tiny_t5(), feature_extractor=sounds(), tokenizer_2=tiny_t5_tokenizer(),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=16, langauge_model_dim=16),
        language_model=GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=32, n_positions=64)),
    )
