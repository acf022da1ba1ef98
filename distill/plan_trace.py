"""One training step without arithmetic: the method's own generator runs on the meta device while every tensor is weighed.

A tensor on the meta device has a shape and a storage of known size but no memory. PyTorch builds the same graph over such
tensors as over real ones, saves the same ones for backward and frees them at the same moments, with gradient
checkpointing as without. So the bytes that are alive are counted as storages come and go; nothing about a method or a network is
assumed. Two things differ on the meta device, and are put right by ``_AsOnDevice``: attention (there is no fused kernel
there) and autocast (there is none at all).
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from distill.errors import UserError
from distill.memory import as_now
from distill.methods.base import Batch, Method
from distill.roles import Roles

ACTIVATIONS, TOGETHER = "activations", "teacher and critic"


@dataclass
class Trace:
    """What one step of a method takes."""

    peak: dict[str, int] = field(default_factory=dict)  #: bytes by part at the moment when the most are alive
    forwards: Counter[tuple[str, int]] = field(default_factory=Counter)  #: (role, batch) → calls of its network
    backwards: Counter[str] = field(default_factory=Counter)  #: role → updates
    flops: Counter[str] = field(default_factory=Counter)  #: "student forward", "critic backward", … → floating-point operations
    features: dict[str, tuple[int, ...]] = field(default_factory=dict)  #: shapes of the hidden features that were asked for, without the batch
    during: str = ""  #: what runs at the peak


class Scale(TorchDispatchMode):
    """Weighs the storages that are alive and counts the floating-point operations that make them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.trace = Trace()
        self.total = self.highest = 0
        self.doing = "losses and heads"
        self._tags: dict[int, tuple[str, int]] = {}
        self._watches: dict[int, Any] = {}
        self._visitors: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _pointwise(func, args) if not kwargs else None
        if out is None:
            out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.trace.flops[self.doing] += int(formula(*args, **(kwargs or {}), out_val=out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor, ACTIVATIONS)
        return out

    def add(self, tensor: Tensor, tag: str) -> None:
        """Count a tensor's storage under a tag; a new tag moves one that was counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._tags:
            if tag != ACTIVATIONS:
                old, size = self._tags[key]
                self.alive[old] -= size
                self.alive[tag] += size
                self._tags[key] = (tag, size)
            return
        size = storage.nbytes()
        self._tags[key] = (tag, size)
        self._watches[key] = weakref.ref(storage, functools.partial(self._freed, key))
        self.hold(tag, size)

    def hold(self, tag: str, size: int) -> None:
        """Count bytes that no tensor here stands for."""
        self.alive[tag] += size
        self.total += size
        if self.total > self.highest:
            self.highest, self.trace.peak, self.trace.during = self.total, dict(self.alive), self.doing

    def forget(self) -> None:
        """Begin the search for the peak anew, from what is alive now."""
        self.highest = 0
        self.hold(ACTIVATIONS, 0)

    def visit(self, tag: str, size: int) -> None:
        """Count weights that come to the device, until ``leave``, or ``settle`` if a graph needs them."""
        if tag not in self._visitors:
            self._visitors[tag] = size
            self.hold(tag, size)

    def leave(self, tag: str) -> None:
        self.hold(tag, -self._visitors.pop(tag))

    def settle(self) -> None:
        """After an update no graph is alive: visitors leave."""
        for tag in list(self._visitors):
            self.leave(tag)

    def _freed(self, key: int, _: Any) -> None:
        tag, size = self._tags.pop(key)
        del self._watches[key]
        self.alive[tag] -= size
        self.total -= size

    @contextmanager
    def named(self, doing: str) -> Iterator[None]:
        before, self.doing = self.doing, doing
        try:
            yield
        finally:
            self.doing = before


def _pointwise(func: Any, args: Any) -> Tensor | None:
    """The result of a common elementwise operation; PyTorch's own way to its shape takes longer than all the rest of a step."""
    if func not in _POINTWISE or args[0].device.type != "meta" or not args[0].is_floating_point():
        return None
    shape = args[0].shape
    if len(args) > 1 and isinstance(args[1], Tensor):
        if args[1].dtype != args[0].dtype or args[1].device.type != "meta" or args[1].dim() != args[0].dim():
            return None
        shape = torch.broadcast_shapes(shape, args[1].shape)
    return torch.empty(shape, dtype=args[0].dtype, device="meta")


_aten = torch.ops.aten
_POINTWISE = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.silu.default, _aten.gelu.default, _aten.silu_backward.default,
    _aten.gelu_backward.default, _aten.sigmoid.default, _aten.neg.default,
}


# -- what the meta device does otherwise --------------------------------------------------------------------------------

_LOWERED = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm",
    "einsum", "scaled_dot_product_attention",
}
#: What CUDA's autocast computes in float32. (The CPU's leaves these in the type that they are given.)
_RAISED = {"group_norm", "layer_norm", "rms_norm", "softmax", "log_softmax", "exp", "log", "pow", "norm", "softplus", "mse_loss", "cumsum", "prod", "sum"}


class _AsOnDevice(TorchFunctionMode):
    """Attention that keeps queries, keys, values and outputs for backward (as every fused kernel does, on a CPU or a GPU),
    and autocast: operands cast to ``autocast`` in matrix products and convolutions, to float32 where CUDA does so."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.autocast, self.raises = precision.autocast, precision.cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.autocast is not None:
            if name in _LOWERED:
                args, kwargs = _floats_to(self.autocast, args), _floats_to(self.autocast, kwargs)
            elif name in _RAISED and self.raises:
                args, kwargs = _floats_to(torch.float32, args), _floats_to(torch.float32, kwargs)
            elif name in ("group_norm", "layer_norm", "rms_norm"):  # mixed types are fine there, but not on the meta device
                like = args[0].dtype
                args, kwargs = (args[0], *_floats_to(like, args[1:])), _floats_to(like, kwargs)
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _floats_to(dtype: torch.dtype, tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() and tree.device.type == "meta" and tree.dtype != torch.float64 else tree
    if isinstance(tree, dict):
        return {k: _floats_to(dtype, v) for k, v in tree.items()}
    return type(tree)(_floats_to(dtype, v) for v in tree) if type(tree) in (list, tuple) else tree


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, **_: Any,
) -> Tensor:
    if query.dim() != 4 or query.device.type != "meta" or (attn_mask is not None and attn_mask.requires_grad):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return op(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


# -- the step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Mixed precision: the type of its products (None: off), and whether by CUDA's rules or the CPU's."""

    autocast: torch.dtype | None = None
    cuda: bool = True


def checkpoint_blocks(backbone: nn.Module, precision: Precision, *switches: Any) -> None:
    """``memory.checkpoint_activations`` for a backbone whose step is to be traced.

    Raises:
        UserError: if the backbone's class cannot do it.
    """

    def run(block: Callable[..., Any], *args: Any) -> Any:
        weighed = as_now(block, *switches)

        def again(*inputs: Any) -> Any:
            with _AsOnDevice(precision):  # the rules around the step do not reach into the backward pass
                return weighed(*inputs)

        return checkpoint(again, *args, use_reentrant=False)

    try:
        backbone.enable_gradient_checkpointing(gradient_checkpointing_func=run)  # type: ignore[operator]
    except (AttributeError, ValueError):
        raise UserError(f"trainer.gradient_checkpointing: {type(backbone).__name__} has no blocks to checkpoint: set it to false") from None


def trace_step(
    method: Method, roles: Roles, batches: Iterable[Batch], standing: Callable[[Scale], None], precision: Precision, visiting: Mapping[str, tuple[str, int]],
) -> Trace:
    """Run one step as the trainer does and weigh it.

    Args:
        roles: networks on the meta device.
        batches: one per micro-batch, on the meta device.
        standing: adds what is alive before and after the step (weights, optimizer states, …) to the scale.
        visiting: role → (part, bytes) of weights that are on the device only while they are used (offload).
    """
    scale = Scale()
    batches = list(batches)
    standing(scale)
    for batch in batches:
        for tensor in tree_leaves([batch.noise, batch.x0, dict(batch.condition.values), dict(batch.condition.null or {})]):
            if isinstance(tensor, Tensor):
                scale.add(tensor, ACTIVATIONS)
    with _counted(roles, scale, visiting), _AsOnDevice(precision), scale:
        _step(method, roles, batches, scale)
    return scale.trace


def _step(method: Method, roles: Roles, batches: list[Batch], scale: Scale) -> None:
    """``Trainer.step`` without what needs values: the check for gradients that are not finite, the optimizers' arithmetic."""
    updates = [method.step(roles, batch) for batch in batches]
    while True:
        trained: tuple[str, ...] = ()
        for update in updates:
            item = next(update, None)
            if item is None:
                return
            role, loss, logs = item
            trained = (role,) if isinstance(role, str) else role
            inputs = [p for r in trained for p in roles.parameters(r)]
            with scale.named(f"{trained[0]} backward"), _marking(inputs, scale):
                torch.autograd.backward(loss / len(updates), inputs=inputs)
            scale.trace.backwards[trained[0]] += 1
        for parameter in (p for r in trained for p in roles.parameters(r)):
            parameter.grad = None
        scale.settle()


@contextmanager
def _marking(parameters: list[nn.Parameter], scale: Scale) -> Iterator[None]:
    """Gradients, as they arrive, counted as such."""

    def arrived(parameter: Tensor) -> None:
        if parameter.grad is not None:
            scale.add(parameter.grad, "gradients")

    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _counted(roles: Roles, scale: Scale, visiting: Mapping[str, tuple[str, int]]) -> Iterator[None]:
    """Note which role's network runs, and on how many samples."""

    def watched(role: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
            scale.trace.forwards[role, len(x_t)] += 1
            if role in visiting:
                scale.visit(*visiting[role])
            with scale.named(f"{role} forward"):
                result = function(x_t, *args, **kwargs)
            caught = result if isinstance(result, Mapping) else result.features
            scale.trace.features.update({name: tuple(value.shape[1:]) for name, value in caught.items()})
            if role in visiting and not torch.is_grad_enabled():
                scale.leave(visiting[role][0])
            return result

        return call

    networks: dict[str, Any] = {r: getattr(roles, r) for r in ("teacher", "student", "critic", "winner", "target") if getattr(roles, r) is not None}
    if roles.together is not None:
        networks[TOGETHER] = roles.together.network
    for role, network in networks.items():
        network.predict, network.features = watched(role, network.predict), watched(role, network.features)
    try:
        yield
    finally:
        for network in networks.values():
            del network.predict, network.features
