"""Parts of the transformer pipelines: a byte tokenizer and two-layer language models, schedulers, video autoencoders, and the table that registers a family:

    family(build, FluxPipeline=("text-to-image", inputs("prompt", height=16, width=16)), ...)

registers one case per row; `build(name)` returns the components of the class of that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from zoo.core import PROMPT, add, tensor, tiny_image, tiny_mask, tiny_video

NEGATIVE = "a car"
SPECIAL = ("<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 300  # 256 bytes and the special tokens
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_tokenizer(length: int = 16, special: tuple[str, ...] = (), end: bool = False, **settings: Any) -> Any:
    """One token per byte, with a chat template and, if wanted, an end token: stands in for those of Qwen, Gemma, Llama, Mistral, GLM, …"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*SPECIAL, *special]
    words = Tokenizer(models.BPE({t: i for i, t in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if end:
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(**{
        "tokenizer_object": words, "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<|im_start|>", "model_max_length": length,
        "padding_side": "right", "extra_special_tokens": tokens[3:], "chat_template": TEMPLATE, **settings,
    })


def language_model(width: int = 16, cls: str = "Qwen3Model", layers: int = 2, **settings: Any) -> Any:
    """A decoder for `bytes_tokenizer`: hidden states (B, L, width) after each of its layers."""
    config = getattr(transformers, cls.replace("ForCausalLM", "").replace("Model", "") + "Config")
    network = getattr(transformers, cls)(config(**{
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, **settings,
    }))
    randomize(network)
    return network


def qwen_vl(width: int = 16, cls: str = "Qwen2_5_VLForConditionalGeneration", layers: int = 2, **settings: Any) -> Any:
    """A Qwen-VL of two layers for `bytes_tokenizer`."""
    text = dict(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4}, pad_token_id=0, bos_token_id=3, eos_token_id=1,
    )
    vision = dict(
        depth=1, embed_dim=width, hidden_size=width, intermediate_size=2 * width, num_heads=2, out_hidden_size=width, patch_size=8, num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )
    special = dict(vision_start_token_id=6, vision_end_token_id=7, image_token_id=8, video_token_id=9)
    config = getattr(transformers, cls.replace("ForConditionalGeneration", "").replace("Model", "") + "Config")
    network = getattr(transformers, cls)(config(text_config=text, vision_config=vision, **special, **settings))
    randomize(network)
    return network


def qwen_processor(version: int = 2) -> Any:
    """Text and pictures for `qwen_vl`: at most 4 tokens per picture, whatever its size."""
    image = transformers.Qwen2VLImageProcessor(min_pixels=256, max_pixels=1024, patch_size=8, merge_size=2)
    video = transformers.Qwen2VLVideoProcessor() if version == 2 else transformers.Qwen3VLVideoProcessor()
    cls = transformers.Qwen2VLProcessor if version == 2 else transformers.Qwen3VLProcessor
    return cls(image_processor=image, tokenizer=bytes_tokenizer(4096), video_processor=video, chat_template=TEMPLATE)


def siglip() -> dict[str, Any]:
    """An image encoder with its processor: 4 tokens, 16 wide."""
    config = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    return dict(image_encoder=transformers.SiglipVisionModel(config), feature_extractor=transformers.SiglipImageProcessor(size={"height": 16, "width": 16}))


def flow(**settings: Any) -> Any:
    """The scheduler of most flow pipelines."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def wan_vae(channels: int = 4, cls: str = "AutoencoderKLWan", **settings: Any) -> Any:
    """A causal video autoencoder: 8× in space, 4× in time (Wan, Qwen-Image, …)."""
    vae = getattr(diffusers, cls)(**{
        "base_dim": 3, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, **settings,
    })
    randomize(vae)
    return vae


def hunyuan_video_vae(channels: int = 4, levels: int = 4) -> Any:
    """A causal video autoencoder: 8× in space, 4× in time, with four levels."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=channels, down_block_types=("HunyuanVideoDownBlock3D",) * levels, up_block_types=("HunyuanVideoUpBlock3D",) * levels,
        block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
    )


def ones(length: int = 5, dtype: torch.dtype = torch.long) -> Tensor:
    """(1, length): a mask that hides nothing."""
    return torch.ones(1, length, dtype=dtype)


def embeddings(names: str, length: int = 5, width: int = 16) -> dict[str, Callable[[], Any]]:
    """Makers of (1, length, width) embeddings, one per name; (1, length) of ones for names with "mask"."""
    return {name: (lambda: ones(length)) if "mask" in name else (lambda s=seed: tensor(1, length, width, seed=s)) for seed, name in enumerate(names.split())}


MAKERS: dict[str, Callable[[int], Any]] = {  # what `inputs` makes for square pictures of a size
    "prompt": lambda size: PROMPT,
    "negative_prompt": lambda size: NEGATIVE,
    "image": lambda size: tiny_image(size),
    "images": lambda size: [tiny_image(size), tiny_image(size, 1)],
    "control_image": lambda size: tiny_image(size, seed=1),
    "mask_image": lambda size: tiny_mask(size),
    "control_mask": lambda size: tiny_mask(size),
    "video": lambda size: tiny_video(9, size),
}


def inputs(names: str = "prompt", *more: dict[str, Any], size: int = 16, **others: Any) -> dict[str, Any]:
    """The arguments of a call: those named, for the call's height and width; `more` and `others` as they are. Functions among them are called for each call."""
    side = others.get("height") or size
    made: dict[str, Any] = {name: (lambda n=name: MAKERS[n](side)) for name in names.split()}
    for extra in (*more, others):
        made.update(extra)
    return made


@torch.no_grad()
def randomize(network: nn.Module, seed: int = 0) -> None:
    """Every matrix is drawn again: layers that start at zero, or with whatever memory held, would make a network that ignores its conditions."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim >= 2 and parameter.numel():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel()))


BACKBONES = ("transformer", "unet", "controlnet", "unconditional_transformer", "prior", "connectors")


def assemble(build: Callable[[str], dict[str, Any]], name: str) -> Any:
    """The pipeline of the class `name` from the components that `build` makes."""
    parts = build(name)
    for key, part in parts.items():
        if key.startswith(BACKBONES) and isinstance(part, nn.Module):
            randomize(part)
    return adapt(getattr(diffusers, name)(**parts))


ATTRIBUTES: dict[str, dict[str, Any]] = {  # what the pipeline's own constructor fixes for full-size networks
    "HiDreamImagePipeline": {"default_sample_size": 16},
    "Flux2Pipeline": {"system_message": "draw"},
    "HunyuanImagePipeline": {"tokenizer_max_length": 200, "tokenizer_2_max_length": 16},
    "Kandinsky5T2IPipeline": {"resolutions": [(64, 64)]},
    "Kandinsky5I2IPipeline": {"resolutions": [(64, 64)]},
    "HunyuanVideo15Pipeline": (_hunyuan15 := {
        "system_message": "draw", "prompt_template_encode_start_idx": 4, "tokenizer_max_length": 60, "tokenizer_2_max_length": 16,
        "vision_num_semantic_tokens": 4,
    }),
    "HunyuanVideo15ImageToVideoPipeline": _hunyuan15,
    "BriaFibo2Pipeline": {"text_encoder_out_layers": ((0, 1, 2), (1, 2, 0))},
}


SLOW = {"AnyFlowFARPipeline", "Kandinsky6SRPipeline"}  # block-sparse attention without its compiled kernels: ten seconds


def adapt(pipeline: Any) -> Any:
    """The pipeline, also one that was just loaded, with the attributes that it needs for tiny networks."""
    for key, value in ATTRIBUTES.get(type(pipeline).__name__, {}).items():
        setattr(pipeline, key, value)
    return pipeline


def family(build: Callable[[str], dict[str, Any]], **rows: tuple[str, dict[str, Any]]) -> None:
    """Registers one case per row: class name = (task, inputs)."""
    for name, (task, call) in rows.items():
        add(name, task, partial(assemble, build, name), **call)
