"""Classifier-free guidance: the ways in which pipelines combine a conditional and an unconditional answer.

The field's own is D_u + w (D_c − D_u), w = 1 off. Some pipelines deviate; which one a pipeline follows is found by comparing
its own guided answer with each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction, cat, same_shapes

Scale = Tensor | float
Rule = Callable[[Tensor, Tensor, Scale], Tensor]


def plain(null: Tensor, cond: Tensor, w: Scale) -> Tensor:
    """u + w (c − u) (Ho & Salimans 2022, with their w + 1)."""
    return null + w * (cond - null)


def shifted(null: Tensor, cond: Tensor, w: Scale) -> Tensor:
    """c + w (c − u): w = 0 is off (Ho & Salimans' own scale; Z-Image, LLaDA)."""
    return cond + w * (cond - null)


def token_norm(null: Tensor, cond: Tensor, w: Scale) -> Tensor:
    """Guided, then scaled back to the conditional answer's norm, token by token (Qwen-Image)."""
    guided = plain(null, cond, w)
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def projected_zero(null: Tensor, cond: Tensor, w: Scale) -> Tensor:
    """CFG-Zero* (Fan et al. 2025): the unconditional answer scaled by its projection on the conditional one."""
    c, u = cond.flatten(1), null.flatten(1)
    s = ((c * u).sum(1) / (u.square().sum(1) + 1e-8)).reshape((-1,) + (1,) * (cond.dim() - 1))
    return null * s + w * (cond - null * s)


RULES: dict[str, Rule] = {"plain": plain, "shifted": shifted, "token_norm": token_norm, "projected_zero": projected_zero}


def find_rule(parts: list[Tensor], guided: Tensor, w: float, tolerance: float, channels: int | None = None) -> tuple[str, int] | None:
    """(rule, index of the conditional part) with which two answers give the guided one; None if no rule does."""
    size = max(1.0, float(guided.abs().max()))
    if channels is not None:  # a learnt variance beside the prediction takes no part
        parts, guided = [p[:, :channels] for p in parts], guided[:, :channels]
    for name, rule in RULES.items():
        for conditional in (1, 0):
            mine = rule(parts[1 - conditional].float(), parts[conditional].float(), w)
            if mine.shape == guided.shape and float((mine - guided.float()).abs().max()) <= tolerance * size:
                return name, conditional
    return None


class Guided(Denoiser):
    """A denoiser under guidance, in one batched call of the network.

    A condition with a ``guidance`` of its own overrides the fixed scale, sample by sample. The halves of the batch lie as in
    the pipeline's: diffusers' OmniGen takes the first row's positions for all.

    Args:
        rule: how the two answers are combined. If not given, the teacher's own, in the field's own scale (1: off): a shifted
            rule is the plain one with another scale.
    """

    def __init__(self, denoiser: Denoiser, scale: float, rule: str | None = None) -> None:
        self.denoiser, self.scale, self.schedule, self.kind = denoiser, scale, denoiser.schedule, denoiser.kind
        if rule is None:
            rule = "plain" if denoiser.guidance_rule == "shifted" else denoiser.guidance_rule
        self.rule = RULES[rule]
        self.off = 0.0 if rule == "shifted" else 1.0
        self.conditional: int = getattr(getattr(denoiser, "call", None), "conditional", 1)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Any = ()) -> Prediction:
        asked = self.asked(x_t, t, condition)
        if asked is not None:
            return self.answered(self.denoiser.predict(*asked, features), x_t, t, condition)
        assert condition is not None  # prompts of different lengths, for a backbone that takes no mask: two calls
        told = condition.without_guidance()
        null = self.denoiser.predict(x_t, t, told.unconditional()).value
        both = self.denoiser.predict(x_t, t, told, features)
        return self._combined(null, both.value, both.features, both.extra, x_t, t, condition)

    def asked(self, x_t: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor, Condition | None] | None:
        """What the network is asked in one call, the halves in the pipeline's own order; None where one call does not do."""
        if condition is None or (condition.guidance is None and self.scale == self.off):
            return x_t, t, condition
        if condition.null is None and _told_guidance(self.denoiser):  # a backbone that was taught it takes the scale itself
            scale = condition.guidance if condition.guidance is not None else torch.full((len(x_t),), float(self.scale), device=x_t.device)
            return x_t, t, condition.with_guidance(scale)
        told = condition.without_guidance()
        null_condition = told.unconditional()
        t = t.to(x_t.device).expand(len(x_t))
        if not same_shapes(told, null_condition):
            return None
        return cat_twice(x_t), cat_twice(t), cat([null_condition, told] if self.conditional else [told, null_condition])

    def answered(self, both: Prediction, x_t: Tensor, t: Tensor, condition: Condition | None) -> Prediction:
        """The guided prediction from the network's answer to ``asked``."""
        if len(both.value) == len(x_t):
            return both
        assert condition is not None
        null, cond = (both.value.chunk(2)[i] for i in (1 - self.conditional, self.conditional))
        kept = {name: value.chunk(2)[self.conditional] for name, value in both.features.items()}
        extra = None if both.extra is None else both.extra.chunk(2)[self.conditional]
        return self._combined(null, cond, kept, extra, x_t, t, condition)

    def _combined(
        self, null: Tensor, cond: Tensor, kept: Mapping[str, Tensor], extra: Tensor | None, x_t: Tensor, t: Tensor, condition: Condition,
    ) -> Prediction:
        t = t.to(x_t.device).expand(len(x_t))
        w: Scale = self.scale
        if condition.guidance is not None:
            w = condition.guidance.to(null).reshape((-1,) + (1,) * (null.dim() - 1))
        # Plain guidance is affine with weights that sum to one, so it may be taken in the native parameterisation.
        return Prediction(self.rule(null, cond, w), self.denoiser.kind, x_t, t, self.schedule, kept, extra)


def _told_guidance(denoiser: Denoiser) -> bool:
    call = getattr(denoiser, "call", None)
    return call is not None and (call.embedded is not None or call.guidance is not None)


def cat_twice(x: Tensor) -> Tensor:
    """(batch, ...) → (2 batch, ...)."""
    return x.repeat(2, *(1,) * (x.dim() - 1))
