"""Distances between two predictions, one value per sample: (batch, ...) × (batch, ...) → (batch,)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from distill.imports import import_object

Metric = Literal["l2", "norm", "pseudo_huber", "pseudo_huber_elementwise"]


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(‖a − b‖² + c²) − c over the whole sample, c = 0.00054 sqrt(d) by default (Song & Dhariwal 2023, iCT, eq. 7),
    divided by sqrt(d), so that its size does not depend on the number of elements d."""
    difference = (a - b).flatten(1)
    d = difference.shape[1]
    c = 0.00054 * math.sqrt(d) if c is None else c
    return ((difference.square().sum(1) + c**2).sqrt() - c) / math.sqrt(d)


def norm(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖ / sqrt(d), not squared (Geng et al. 2024, ECT: the pseudo-Huber distance at c = 0)."""
    return pseudo_huber(a, b, 1e-8)


def pseudo_huber_elementwise(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """Mean over elements of sqrt((a − b)² + c²) − c (LCM's Huber loss)."""
    return (((a - b).square() + c**2).sqrt() - c).flatten(1).mean(1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": l2,
    "norm": norm,
    "pseudo_huber": pseudo_huber,
    "pseudo_huber_elementwise": pseudo_huber_elementwise,
}


Distance = Callable[[Tensor, Tensor], Tensor]


def find_distance(name: str) -> Distance:
    """One of these by name, ``lpips`` (of images in [0, 1]), or by the import path ``module:function`` of your own.

    Raises:
        ValueError: if there is none.
    """
    if name in METRICS:
        return METRICS[name]
    if name == "lpips":
        if importlib.util.find_spec("lpips") is None:
            raise ValueError("metric lpips needs the package lpips, which is not installed: pip install lpips, or use pseudo_huber")
        from distill.losses.perceptual import lpips

        return lpips
    if ":" not in name:
        raise ValueError(f"there is no metric {name!r}; known: {', '.join(METRICS)}, lpips, or the import path of your own, module:function")
    found: Distance = import_object(name)
    return found


def known_distance(name: str) -> str:
    """The name, if there is such a distance.

    Raises:
        ValueError: if not.
    """
    find_distance(name)
    return name


def batch_mean_abs(a: Tensor) -> Tensor:
    """mean |a| of each sample, shaped to divide it: (batch, 1, ...)."""
    return a.abs().flatten(1).mean(1).reshape((-1,) + (1,) * (a.dim() - 1))
