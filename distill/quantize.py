"""A frozen backbone in 8 or 4 bits, with bitsandbytes (the extra ``quantization``) or torchao (the extra ``torchao``).

    8bit    LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339       4bit   NF4, Dettmers et al. 2023 (QLoRA), arXiv 2305.14314
    int8    torchao, weights alone, a scale per row                  int4   torchao, weights alone, a scale per group of 128
    float8  torchao, e4m3 weights alone, a scale per row

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

Bits = Literal["8bit", "4bit", "int8", "int4", "float8"]
TORCHAO = ("int8", "int4", "float8")
EXTRAS = {"bitsandbytes": "quantization", "torchao": "torchao"}


def package_of(bits: str) -> str:
    """The library that quantises so."""
    return "torchao" if bits in TORCHAO else "bitsandbytes"


def missing_package(name: str = "bitsandbytes") -> str | None:
    """What to install, or None if the package is there."""
    found = importlib.util.find_spec(name) is not None
    return None if found else f"needs {name}, which is not installed: pip install 'distill-diffusion[{EXTRAS[name]}]'"


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
        UserError: if the package is missing or refuses, or the backbone has no such layer.
    """
    problem = missing_package(package_of(bits))
    if problem is not None:
        raise UserError(f"quantization {problem}")
    layers = {n: m for n, m in backbone.named_modules() if type(m) is nn.Linear and inside_a_block(n)}
    if not layers:
        raise UserError(f"teacher.quantize: {type(backbone).__name__} has no linear layer inside its blocks: leave it out")
    try:
        if bits in TORCHAO:
            _with_torchao(backbone, set(layers), bits, device)
        else:
            _with_bitsandbytes(backbone, layers, bits, device)
    except (RuntimeError, NotImplementedError, AttributeError, ImportError, ValueError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"teacher.quantize: {package_of(bits)} cannot quantise to {bits} on {device}: {reason}") from None
    backbone.to(device)
    backbone.eval().requires_grad_(False)
    return backbone


def _with_bitsandbytes(backbone: nn.Module, layers: dict[str, nn.Linear], bits: Bits, device: torch.device | str) -> None:
    package = bitsandbytes()
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, _quantized(package, layer, bits).to(device))
    setattr(backbone, f"is_loaded_in_{bits}", True)  # PEFT looks for it


def _with_torchao(backbone: nn.Module, layers: set[str], bits: Bits, device: torch.device | str) -> None:
    """The layers stay; their weights become tensors of torchao's, which multiply in the dtype that they were."""
    try:
        from torchao import quantization as package
    except Exception as error:  # a build for another PyTorch fails in many ways
        raise UserError(f"torchao does not load ({type(error).__name__}: {error}): reinstall it, or leave out teacher.quantize") from None
    config = {
        "int8": lambda: package.Int8WeightOnlyConfig(version=2, set_inductor_config=False),
        "int4": lambda: package.Int4WeightOnlyConfig(group_size=128, set_inductor_config=False),
        "float8": lambda: package.Float8WeightOnlyConfig(set_inductor_config=False),
    }[bits]()
    package.quantize_(backbone, config, filter_fn=lambda module, name: name in layers, device=device)


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
