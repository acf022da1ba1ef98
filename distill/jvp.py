"""Directional derivatives of what a network says, along tangents in (x, t) and the end time s.

    d/dh  F(x + h v_x, t + h v_t, s + h v_s)  at h = 0

exactly, in forward mode: dual numbers go once through schedule, conversions and backbone (the Jacobian-vector product that
continuous-time consistency models and flow maps are made of: Lu & Song 2024, arXiv 2410.11081, sec. 4; Geng et al. 2025,
arXiv 2505.13447, eq. 8). No activations are kept, since no gradient is taken of it, and so gradient checkpointing has nothing
to do. Fused attention kernels have no forward mode: PyTorch's plain one ("math") takes their place, at O(tokens²) memory.

Where an operation has no forward mode at all, central differences: two more evaluations for each argument that has a tangent.
They need a network in float32: the rounding of 16 bit, divided by a small step, is larger than the derivative.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.denoiser import Condition, Denoiser
from distill.errors import UserError
from distill.schedule import Kind, NoiseSchedule, double, expand_to

Mode = Literal["auto", "exact", "finite_difference"]

logger = logging.getLogger(__name__)
#: networks (or functions' owners) that were found to have no forward mode, and those of which the log has told their attention
_without: WeakSet[Any] = WeakSet()
_told: WeakSet[Any] = WeakSet()
#: how far central differences move a state, in parts of its root mean square; a time; and a time as the backbone counts it
STATE_STEP, TIME_STEP, MODEL_TIME_STEP = 1e-2, 1e-3, 0.03


def directional_derivative(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition | None = None, *, v_x: Tensor | None = None, v_t: Tensor | None = None,
    s: Tensor | None = None, v_s: Tensor | None = None, kind: Kind = "x0", mode: Mode = "auto",
) -> tuple[Tensor, Tensor]:
    """(value, derivative) of a denoiser's prediction, both (batch, ...) without gradient, in the dtype that ``Prediction`` has.

    Args:
        v_x, v_t, v_s: tangents: like x_t, and (batch,) or scalar for the times; None: zero.
        s: the end time that a two-time student is told; None: none, or what the condition says already.
        kind: of the prediction that is differentiated, conversions included.
        mode: ``exact``: forward mode or an error; ``finite_difference``; ``auto``: the first, if the network has it.
    """
    batch = len(x_t)
    t = double(t.to(x_t.device)).expand(batch)
    told = condition or Condition()
    end = s if s is not None else told.end

    def said(x: Tensor, time: Tensor, *ends: Tensor) -> Tensor:
        return denoiser.predict(x, time, told.ending(ends[0]) if ends else told).as_kind(kind)

    primals, tangents = [x_t, t], [v_x, _time_tangent(v_t, t)]
    steps = [_state_step(x_t), _time_step(denoiser.schedule, t)]
    if end is not None:
        end = double(end.to(x_t.device)).expand(batch)
        primals, tangents = [*primals, end], [*tangents, _time_tangent(v_s, end)]
        steps = [*steps, _time_step(denoiser.schedule, end)]
    return jvp(said, primals, tangents, mode, owner=denoiser, steps=steps)


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], mode: Mode = "auto", *,
    owner: Any = None, steps: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(value, derivative) of any function of tensors at ``primals`` along ``tangents`` (None: zero), without gradient.

    Args:
        function: (batch, ...) for each of its arguments → (batch, ...); a sample's answer depends on that sample alone.
        owner: the denoiser that it asks: whether forward mode works is tried once for its network, and its dtype is known.
        steps: (batch,) how far central differences move each argument (root mean square); None: 1e-2 of a state's, 1e-3 of a time.

    Raises:
        UserError: if forward mode is wanted and not there, or finite differences of a network in half precision.
    """
    network = getattr(owner, "backbone", owner)
    if primals[0].is_meta:  # a plan's networks have no values: it is weighed as two evaluations at once are
        with torch.no_grad():
            value, _ = function(*primals), function(*primals)
        return value, torch.zeros_like(value)
    if mode == "finite_difference" or (mode == "auto" and network is not None and network in _without):
        return _central(function, primals, tangents, steps, owner)
    try:
        return _forward(function, primals, tangents, network)
    except (NotImplementedError, RuntimeError) as error:
        if not _no_forward_mode(error):
            raise
        reason = str(error).strip().splitlines()[0]
        if mode == "exact":
            raise UserError(f"an operation of {_name(network)} has no forward-mode derivative ({reason}): set it to finite_difference") from None
        if network is not None:
            _without.add(network)
        logger.warning("%s has no forward-mode derivative (%s): central differences stand in", _name(network), reason)
    return _central(function, primals, tangents, steps, owner)


@torch.no_grad()
def _forward(function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], network: Any) -> tuple[Tensor, Tensor]:
    _say_attention(network)
    with _plain_kernels(), forward_ad.dual_level():
        pairs = zip(primals, tangents, strict=True)
        duals = [p if v is None else forward_ad.make_dual(p.detach().contiguous(), v.detach().to(p).contiguous()) for p, v in pairs]
        value, derivative = forward_ad.unpack_dual(function(*duals))
        value = value.clone()
        derivative = torch.zeros_like(value) if derivative is None else derivative.clone()
    if torch.is_autocast_enabled(value.device.type):  # casts of weights made here carry no gradient: the next forward makes its own
        torch.clear_autocast_cache()
    return value, derivative


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention by the kernel that has a forward mode, and compiled networks as they were written."""
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def _central(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], steps: Sequence[Tensor] | None, owner: Any,
) -> tuple[Tensor, Tensor]:
    device = primals[0].device.type
    if getattr(owner, "dtype", torch.float32) in (torch.bfloat16, torch.float16):
        raise UserError(f"finite differences of {_name(getattr(owner, 'backbone', owner))} in 16 bit are noise: set teacher.dtype: float32")
    steps = [_state_step(p) if p.dim() > 1 else torch.full_like(p, TIME_STEP) for p in primals] if steps is None else steps
    with torch.autocast(device, enabled=False):
        value = function(*primals)
        derivative = torch.zeros_like(value)
        for i, v in enumerate(tangents):
            if v is None or not bool(v.any()):
                continue
            primal = primals[i]
            length = double(v).flatten(1).square().mean(1).sqrt() if v.dim() > 1 else double(v).abs()
            h = steps[i].to(length) / length.clamp_min(1e-30)
            moved = [primal + (sign * expand_to(h, primal) * v).to(primal) for sign in (1, -1)]
            ends = [function(*primals[:i], m, *primals[i + 1 :]) for m in moved]
            part = (double(ends[0]) - double(ends[1])) / (2 * expand_to(h, value))
            derivative += torch.where(expand_to(length, value) > 0, part, 0).to(derivative)
    return value, derivative


def _state_step(x: Tensor) -> Tensor:
    """(batch,): what a state is moved by, root mean square."""
    size = double(x).flatten(1).square().mean(1).sqrt().clamp_min(1e-3)
    return size * (1e-5 if x.dtype == torch.float64 else STATE_STEP)


def _time_step(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """(batch,): at most 1e-3, and so little that the backbone, whose embedding oscillates with the time it is told, sees less
    than a radian of it."""
    h = 1e-6
    slope = (schedule.model_time(t + h) - schedule.model_time(t - h)).abs() / (2 * h)
    return (MODEL_TIME_STEP / slope.clamp_min(1e-12)).clamp_max(TIME_STEP)


def _time_tangent(v: Tensor | None, t: Tensor) -> Tensor | None:
    return None if v is None else double(v.to(t.device)).expand(len(t))


def _no_forward_mode(error: Exception) -> bool:
    text = str(error).lower()
    return "forward ad" in text or "forward mode ad" in text or "jvp" in text or "forward-mode" in text


def _name(network: Any) -> str:
    return "the function" if network is None else type(network).__name__


def _say_attention(network: Any) -> None:
    if not isinstance(network, torch.nn.Module) or network in _told:
        return
    _told.add(network)
    if any(hasattr(m, "processor") or isinstance(m, torch.nn.MultiheadAttention) for m in network.modules()):
        logger.warning("derivatives of %s: its attention runs on PyTorch's math kernel, for the fused ones have no forward mode", _name(network))
