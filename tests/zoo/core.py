"""The registry of tiny pipelines and the parts that they share: random weights, no network, CPU, float32.

A case is a function named after the pipeline class:

    @case("text-to-image", prompt=PROMPT, height=16, width=16)
    def StableDiffusionPipeline() -> Any:
        return diffusers.StableDiffusionPipeline(...)

Everything built inside is seeded, so that two builds are equal. The arguments of ``case`` are those of the pipeline's call, without the number of steps,
the generator, the type of the output and the guidance scale. A function among them is called, so that each call has objects of its own.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tiny import tokenizer as _clip_tokenizer
from torch import Tensor, nn

PROMPT = "a red apple"
SQUARE = {"height": 16, "width": 16}
TEXT = {"prompt": PROMPT, **SQUARE}
TASKS = (
    "text-to-image", "class-to-image", "unconditional", "image-to-image", "inpainting", "control", "super-resolution", "text-to-video", "image-to-video",
    "video", "audio", "3d", "other",
)


@dataclass(frozen=True)
class Case:
    """One pipeline class: how a tiny one is built, and the arguments of its call."""

    name: str  #: the pipeline's class name
    task: str  #: one of TASKS
    build: Callable[[], Any]  #: -> the pipeline: float32, CPU, eval, the same each time
    call: Callable[[], dict[str, Any]]  #: -> keyword arguments, without num_inference_steps, generator, output_type and guidance_scale


CASES: dict[str, Case] = {}
UNBUILDABLE: dict[str, str] = {}  #: name -> why there is no case


def add(name: str, task: str, function: Callable[[], Any], **call: Any) -> None:
    """Register a pipeline: ``function`` builds it, ``call`` are the arguments of its call (functions among them are called each time)."""
    if task not in TASKS or name in CASES:
        raise ValueError(f"{name}: registered twice, or {task!r} is none of {TASKS}")
    CASES[name] = Case(name, task, lambda: finished(function), lambda: {k: v() if isinstance(v, types.FunctionType) else v for k, v in call.items()})


def case(task: str, **call: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Decorator of a function that is named after the pipeline class and returns the pipeline: see ``add``."""

    def decorate(function: Callable[[], Any]) -> Callable[[], Any]:
        add(function.__name__, task, function, **call)
        return function

    return decorate


def build(name: str) -> Any:
    """The tiny pipeline of that class."""
    return CASES[name].build()


def finished(function: Callable[[], Any]) -> Any:
    """The pipeline of ``function``: seeded, in eval mode, quiet; weights that start at zero (output layers, adapters) become small random ones."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        pipeline = function()
        for module in modules(pipeline):
            module.float().eval().requires_grad_(False)
            for p in module.parameters():
                if p.ndim > 1 and not p.any():
                    p.normal_(std=0.05)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def modules(pipeline: Any) -> list[nn.Module]:
    """The networks of a pipeline."""
    return [c for c in pipeline.components.values() if isinstance(c, nn.Module)]


def assemble(name: str, **parts: Any) -> Any:
    """The pipeline class of that name on those of the parts that its constructor takes; what it requires beyond them is None (safety checkers and the like)."""
    import diffusers

    cls = getattr(diffusers, name)
    wanted = inspect.signature(cls.__init__).parameters
    required = [k for k, p in wanted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and k != "self"]
    switches = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    return cls(**{**dict.fromkeys(required), **switches, **{k: v for k, v in parts.items() if k in wanted}})


# Inputs


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Normal values: for embeddings and latents."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_image(size: int = 16, seed: int = 0) -> Any:
    """A PIL image, ``size``×``size``, RGB."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def tiny_mask(size: int = 16) -> Any:
    """A PIL image whose left half is white."""
    from PIL import Image

    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 255
    return Image.fromarray(mask)


def tiny_video(frames: int = 5, size: int = 16) -> list[Any]:
    """PIL images."""
    return [tiny_image(size, seed) for seed in range(frames)]


# Tokenizers and text encoders


def tiny_clip_tokenizer(length: int = 16) -> Any:
    """A CLIP tokenizer of a few words and all letters."""
    words = _clip_tokenizer()
    words.model_max_length = length
    return words


def _pieces() -> list[str]:
    return ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()<>-_/|[]{}", "\n", "▁a", "▁red", "▁apple"]


def tiny_t5_tokenizer(length: int = 16) -> Any:
    """A T5 tokenizer (unigram) of letters and two words."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0 - (len(piece) < 2)) for piece in _pieces())]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


def tiny_clip_text(hidden: int = 16, length: int = 16, projection: int | None = None, layers: int = 2, **settings: Any) -> Any:
    """A CLIP text encoder for ``tiny_clip_tokenizer``: ``hidden`` wide; with a projection to ``projection`` where one is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=projection or hidden, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id, **settings,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def tiny_clip_text_with_projection(hidden: int = 16, projection: int = 16, **settings: Any) -> Any:
    """A CLIPTextModelWithProjection for ``tiny_clip_tokenizer``."""
    return tiny_clip_text(hidden, projection=projection, **settings)


def tiny_t5(hidden: int = 16, **settings: Any) -> Any:
    """A T5 encoder for ``tiny_t5_tokenizer``."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        vocab_size=len(_pieces()) + 3, d_model=hidden, d_ff=2 * hidden, d_kv=8, num_heads=2, num_layers=1, feed_forward_proj="gated-gelu", **settings,
    ))


def tiny_gemma_tokenizer() -> Any:
    """A Gemma tokenizer (byte pairs) of letters and two words, padded on the right."""
    from transformers import GemmaTokenizer

    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_pieces(), "re", "ap", "pl", "le"])}
    return GemmaTokenizer(vocab=vocabulary, merges=[("r", "e"), ("a", "p"), ("l", "e")])


def tiny_gemma2(hidden: int = 16, **settings: Any) -> Any:
    """A Gemma 2 for ``tiny_gemma_tokenizer``."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(
        vocab_size=len(tiny_gemma_tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=512, **settings,
    ))


def tiny_bert_tokenizer(length: int = 16) -> Any:
    """A BERT tokenizer of letters and two words."""
    from transformers import BertTokenizer

    pieces = [p.lstrip("▁") for p in _pieces() if len(p.strip("▁\n"))]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces), *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=length)


def tiny_bert(hidden: int = 16, **settings: Any) -> Any:
    """A BERT for ``tiny_bert_tokenizer``."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(
        vocab_size=len(tiny_bert_tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2, **settings,
    ))


def tiny_clip_vision(hidden: int = 16, projection: int | None = 16, size: int = 16, patch: int = 8, **settings: Any) -> Any:
    """A CLIP image encoder for ``size``×``size`` images; with a projection where one is given."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=patch,
        projection_dim=projection or hidden, **settings,
    )
    return CLIPVisionModel(config) if projection is None else CLIPVisionModelWithProjection(config)


def tiny_clip_images(size: int = 16) -> Any:
    """The image processor for ``tiny_clip_vision``."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size=size, crop_size=size)


# Autoencoders and backbones


def tiny_autoencoder_kl(latent_channels: int = 4, channels: tuple[int, ...] = (8, 16), **settings: Any) -> Any:
    """An AutoencoderKL: one pixel of the latents is 2^(levels − 1) of the image's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{
        "in_channels": 3, "out_channels": 3, "latent_channels": latent_channels, "block_out_channels": channels, "norm_num_groups": 4,
        "layers_per_block": 1, "sample_size": 16, "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels), **settings,
    })


def tiny_unet2d_condition(channels: int = 4, cross: int | None = 16, **settings: Any) -> Any:
    """A UNet2DConditionModel on 8×8 latents of ``channels`` channels, with text embeddings ``cross`` wide."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": channels, "out_channels": channels, "block_out_channels": (16, 32), "layers_per_block": 1,
        "cross_attention_dim": cross, "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **settings,
    })


# What is not covered

UNBUILDABLE.update(dict.fromkeys(
    ("BlipDiffusionPipeline", "BlipDiffusionControlNetPipeline"), "fails with transformers 5: its Q-Former calls invert_attention_mask, which is gone",
))
UNBUILDABLE["VersatileDiffusionPipeline"] = "a container: it has no __call__"
UNBUILDABLE["VersatileDiffusionDualGuidedPipeline"] = "fails in this diffusers release: its attention blocks do not take encoder_attention_mask"

#: Pipelines whose call fails without guidance in this diffusers release: name -> why.
ALWAYS_GUIDED = {
    "TextToVideoZeroPipeline": "concatenates the negative embeddings, which are None without guidance",
    "HunyuanDiTPAGPipeline": "repeats sizes and style three times, for two rows, without guidance",
}

#: Pipelines that diffusers saves but does not load again in this release (a user's own cannot either): name -> why.
NOT_RELOADABLE = {
    **dict.fromkeys(
        (
            "AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline", "PaintByExamplePipeline", "StableCascadeCombinedPipeline", "StableCascadeDecoderPipeline",
            "UnCLIPPipeline", "UnCLIPImageVariationPipeline", "VQDiffusionPipeline", "WuerstchenCombinedPipeline", "WuerstchenDecoderPipeline",
            "WuerstchenPriorPipeline",
        ),
        "model_index.json names a component's class as one of diffusers, which does not export it",
    ),
    "UniDiffuserPipeline": "its text decoder shares tensors, which safetensors refuses",
}


def exported() -> dict[str, type]:
    """The pipeline classes that diffusers exports: name -> class. Those whose optional libraries are absent are among them (as stand-ins)."""
    import diffusers
    from diffusers import DiffusionPipeline

    found = {n: c for n in dir(diffusers) if "Pipeline" in n and isinstance(c := getattr(diffusers, n), type)}
    return {n: c for n, c in found.items() if (issubclass(c, DiffusionPipeline) and c is not DiffusionPipeline) or hasattr(c, "_backends")}


@lru_cache(maxsize=1)
def absent() -> dict[str, str]:
    """Pipelines that diffusers replaces by a stand-in here: name -> the libraries that it would need."""
    return {n: "needs " + ", ".join(c._backends) for n, c in exported().items() if hasattr(c, "_backends")}


def missing() -> list[str]:
    """Exported pipelines with no case and no reason for that."""
    return sorted(set(exported()) - set(CASES) - set(UNBUILDABLE) - set(absent()))
