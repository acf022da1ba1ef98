"""A device that is not the CPU, on any machine: tensors that say so and whose numbers are computed on the CPU.

Tensors on ``ELSEWHERE`` and on the CPU do not mix, as those on a GPU and on the CPU do not: what mixes them raises here as
it would there. Allowed is what CUDA allows: copies, scalars, and indices that lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

ELSEWHERE = torch.device("lazy", 0)  # a device type without kernels, which autograd serves from its own thread, as the CPU

_aten = torch.ops.aten
_CROSSES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXES = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class MixedDevices(RuntimeError):
    """What CUDA says: expected all tensors to be on the same device."""


class There(Tensor):
    """A tensor that lies elsewhere."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, layout=here.layout, device=ELSEWHERE,
            requires_grad=here.requires_grad,
        )
        made.here = here
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> There:
        return There(inner["here"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchDispatchMode):
    """Makes tensors elsewhere where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device)
    if there and func not in _CROSSES:
        strangers = [t for t in tensors if not isinstance(t, There) and t.dim()]
        if func in _INDEXES and isinstance(args[0], There) and isinstance(args[2] if len(args) > 2 else args[0], There):
            strangers = []
        if strangers:
            raise MixedDevices(f"{func}: a tensor of shape {tuple(strangers[0].shape)} is on the CPU, others are elsewhere")
    if asked == ELSEWHERE and kwargs.get("generator") is not None:
        raise MixedDevices(f"{func}: a generator of the CPU cannot draw numbers elsewhere")
    inner_args, inner_kwargs = tree_map_only(There, lambda t: t.here, (args, kwargs))
    if asked is not None:
        inner_kwargs = inner_kwargs | {"device": torch.device("cpu")}
    result = func(*inner_args, **inner_kwargs)
    to_there = asked == ELSEWHERE if asked is not None else bool(there) and (func is not _aten.copy_.default or isinstance(args[0], There))
    if not to_there:
        return result
    if asked is not None and func is _aten._to_copy.default and isinstance(result, Tensor):
        result = result.clone() if any(result is t for t in tree_leaves(inner_args)) else result
    wrapped = tree_map(lambda t: There(t) if isinstance(t, Tensor) and not isinstance(t, There) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


class _Data(TorchFunctionMode):
    """Numbers from Python that are wanted elsewhere are made here and sent there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None and torch.device(kwargs["device"]) == ELSEWHERE:
            del kwargs["device"]
            return func(*args, **kwargs).to(ELSEWHERE)
        return func(*args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """For the time of the block there is another device."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Devices(), _Data():
            yield ELSEWHERE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
