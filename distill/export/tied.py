"""Writing networks whose tensors share memory (an output layer tied to the embedding), which safetensors refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def untied(pipeline: Any) -> Iterator[None]:
    """For the time of the block, the weights of the pipeline's diffusers models come out in memory of their own each. (Those
    of transformers know how to write theirs.)"""
    from diffusers import ModelMixin

    modules: list[Any] = [m for m in pipeline.components.values() if isinstance(m, ModelMixin) and _shares(m)]
    for module in modules:
        module.state_dict = _separate(module.state_dict)
    try:
        yield
    finally:
        for module in modules:
            del module.state_dict


def _shares(module: nn.Module) -> bool:
    tensors = [t for t in module.state_dict().values() if t.numel()]
    return len({_place(t) for t in tensors}) < len(tensors)


def _separate(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        seen: set[tuple[Any, ...]] = set()
        tensors = original(*args, **kwargs)
        for name, tensor in tensors.items():
            if _place(tensor) in seen:
                tensors[name] = tensor.clone()
            seen.add(_place(tensor))
        return tensors

    return state_dict


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape
