"""Optimizers by name, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from distill.config import Optimizer as Settings
from distill.quantize import bitsandbytes


def build_optimizer(settings: Settings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer over one role's parameters: one fused kernel where PyTorch has it (CUDA, CPU), else its ``foreach`` loops.

    Raises:
        UserError: for ``adamw8bit`` without a bitsandbytes that loads.
    """
    lr, betas, decay = settings.lr, settings.betas, settings.weight_decay
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    how = {"fused": True} if fused else {"foreach": True}
    if settings.name == "adamw8bit":
        optimizer: torch.optim.Optimizer = bitsandbytes().optim.AdamW8bit(parameters, lr, betas, weight_decay=decay)
        return optimizer
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, lr, betas, weight_decay=decay, **how)
    if settings.name == "adam":
        return torch.optim.Adam(parameters, lr, betas, weight_decay=decay, **how)
    if settings.name == "radam":
        return torch.optim.RAdam(parameters, lr, betas, weight_decay=decay, foreach=True)
    return torch.optim.SGD(parameters, lr, momentum=betas[0], weight_decay=decay, **how)


def rate_at(settings: Settings, step: float, steps: float) -> float:
    """The factor on the learning rate at a step: linear warm-up, then constant or decayed to zero at the last step."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    if settings.decay == "linear":
        return 1 - progress
    if settings.decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
