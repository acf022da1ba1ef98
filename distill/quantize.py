"""A frozen backbone in 8 or 4 bits, with bitsandbytes (the extra ``quantization``).

    8 bit   LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339       4 bit   NF4, Dettmers et al. 2023 (QLoRA), arXiv 2305.14314

Only the linear layers inside the blocks are quantised: they hold nearly all of the weights; convolutions, norms, embeddings
and the layers at both ends keep the teacher's dtype. Gradients pass through to what lies before, also to adapters on the
quantised layers themselves.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import nn

from distill.adapters import inside_a_block
from distill.errors import UserError

Bits = Literal["8bit", "4bit"]


def missing_package() -> str | None:
    """What to install, or None if bitsandbytes is there."""
    found = importlib.util.find_spec("bitsandbytes") is not None
    return None if found else "needs bitsandbytes, which is not installed: pip install 'distill-diffusion[quantization]'"


def bitsandbytes() -> Any:
    """The package, loaded.

    Raises:
        UserError: if it is missing or does not load here.
    """
    problem = missing_package()
    if problem is not None:
        raise UserError(f"quantization {problem}")
    try:
        import bitsandbytes as package
    except Exception as error:  # a build for another CUDA or PyTorch fails in many ways
        raise UserError(f"bitsandbytes does not load ({type(error).__name__}: {error}): reinstall it, or do without teacher.quantize and adamw8bit") from None
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns of the same cast at every call
    return package


def quantize(backbone: nn.Module, bits: Bits, device: torch.device | str) -> nn.Module:
    """Replace the linear layers inside the blocks by quantised ones, in place, one by one, and move all to the device.

    Raises:
        UserError: if bitsandbytes is missing or refuses, or the backbone has no such layer.
    """
    package = bitsandbytes()
    layers = {n: m for n, m in backbone.named_modules() if type(m) is nn.Linear and inside_a_block(n)}
    if not layers:
        raise UserError(f"teacher.quantize: {type(backbone).__name__} has no linear layer inside its blocks: leave it out")
    try:
        for name, layer in layers.items():
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, _quantized(package, layer, bits).to(device))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise UserError(f"teacher.quantize: bitsandbytes cannot quantise to {bits} on {device}: {error}") from None
    backbone.to(device)
    backbone.eval().requires_grad_(False)
    setattr(backbone, f"is_loaded_in_{bits}", True)  # PEFT looks for it
    return backbone


def _quantized(package: Any, layer: nn.Linear, bits: Bits) -> nn.Module:
    shape: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    weight = layer.weight.detach().cpu().contiguous()
    if bits == "8bit":
        made = package.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, threshold=6.0, **shape)
        made.weight = package.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = package.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, quant_type="nf4", **shape)
        made.weight = package.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return made
