"""Which kernel computes a backbone's attention.

    sdpa       PyTorch's scaled_dot_product_attention, which chooses among its kernels
    flash      of these, the flash kernel alone (Dao 2023, arXiv 2307.08691): 16 bit, no masks; in float32, as sdpa
    xformers   xFormers' memory-efficient attention (the extra ``xformers``)

Only the backbone's own attention layers are changed, not those of text encoders and decoders.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.errors import UserError

Kernel = Literal["default", "sdpa", "flash", "xformers"]


def use_attention(backbone: nn.Module, kernel: Kernel, device: torch.device) -> None:
    """Choose the kernel of every attention layer of a backbone.

    Raises:
        UserError: if the kernel does not load or run here, or the backbone has no layer for which it can be chosen.
    """
    if kernel == "default":
        return
    if kernel == "xformers":
        check_xformers(device)
    layers = [m for m in backbone.modules() if hasattr(m, "processor") and isinstance(m, nn.Module)]
    if not layers:
        raise UserError(f"trainer.attention: {type(backbone).__name__} has no attention layer whose kernel can be chosen: set it to default")
    for layer in layers:
        (_with_xformers if kernel == "xformers" else _with_sdpa)(layer)
        if kernel == "flash":
            _with_flash(layer)


def missing_xformers() -> str | None:
    """What is missing for xformers, as far as can be told without loading it."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed: pip install 'distill-diffusion[xformers]', or set attention: sdpa"
    return None if torch.cuda.is_available() else "xformers needs a CUDA device, and there is none here: set attention: sdpa"


def check_xformers(device: torch.device) -> None:
    """Run a tiny attention, forwards and backwards: an installed package whose kernels are of another build fails here.

    Raises:
        UserError: if it is missing or does not run.
    """
    problem = missing_xformers()
    if problem is not None:
        raise UserError(f"trainer.attention: {problem}")
    try:
        from xformers.ops import memory_efficient_attention

        q = torch.randn(1, 8, 2, 32, device=device, dtype=torch.float16, requires_grad=True)
        memory_efficient_attention(q, q, q).float().sum().backward()
    except Exception as error:  # missing kernels show as ImportError, NotImplementedError, RuntimeError, …
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"trainer.attention: xformers is installed but does not run on this {device.type} device ({reason}): set attention: sdpa") from None


def _with_sdpa(layer: Any) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if hasattr(layer.processor, "_attention_backend"):
        layer.processor._attention_backend = AttentionBackendName.NATIVE
    elif type(layer.processor) is AttnProcessor and getattr(layer, "scale_qk", True):
        layer.set_processor(AttnProcessor2_0())


def _with_xformers(layer: Any) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    if hasattr(layer.processor, "_attention_backend"):
        layer.processor._attention_backend = AttentionBackendName.XFORMERS
    elif hasattr(layer, "set_use_memory_efficient_attention_xformers"):
        layer.set_use_memory_efficient_attention_xformers(True)
    else:
        raise UserError(f"trainer.attention: {type(layer).__name__} cannot use xformers: set attention: sdpa")


def _with_flash(layer: nn.Module) -> None:
    """Allow PyTorch's flash kernel alone while the layer runs in 16 bit: under mixed precision a float32 network still
    samples in float32, outside of training. By hooks, so that it also holds when a checkpointed block runs again in the
    backward pass."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    entered: list[AbstractContextManager[Any]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        narrow = given.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(given.device.type)
        context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if narrow else nullcontext()
        context.__enter__()
        entered.append(context)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    leave: Callable[..., None] = after
    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(leave, always_call=True)
