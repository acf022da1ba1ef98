"""The layers of an adapter, and the weights that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.student import Student


@dataclass(frozen=True)
class Layer:
    """One adapted layer: W + scale · up · down, its rows then set to the given magnitudes (DoRA).

    Args:
        down: (rank, inputs, …), up: (outputs, rank, …); convolutions have their kernel in ``down``.
        alpha: strength; scale = alpha / rank.
        magnitude: (outputs, …) or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """scale · up · down, (outputs, inputs · kernel), in float64."""
        return self.scale * self.up.double().flatten(1) @ self.down.double().flatten(1)


def adapted_layers(student: Student) -> dict[str, Layer]:
    """The student's adapter by the names of its layers, on the CPU."""
    assert student.adapters is not None
    settings = student.adapters.settings
    parameters = {n: p.detach().cpu().clone() for n, p in student.network.named_parameters().items()}
    layers = {}
    for name in parameters:
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        magnitude = parameters.get(f"{layer}.lora_magnitude_vector.weight", parameters.get(f"{layer}.lora_magnitude_vector"))
        layers[layer] = Layer(parameters[name], parameters[f"{layer}.lora_B.weight"], settings.alpha, magnitude)
    return layers


def base_weight(backbone: nn.Module, name: str) -> Tensor:
    """The weight under the adapter of a layer (of any layer, adapted or not)."""
    module: Any = backbone.get_submodule(name)
    weight: Tensor = getattr(module, "base_layer", module).weight
    return weight.detach()


def check_same(layers: Mapping[str, Layer], found: Mapping[str, tuple[Tensor, Tensor | None]], backbone: nn.Module) -> None:
    """That what was read back changes each layer's weight as the adapter does.

    Args:
        found: by layer, the change of the weight (outputs, inputs · kernel) and the magnitudes, as read from the file.

    Raises:
        UserError: if a layer is missing, or differs by more than float32 rounding.
    """
    for name, layer in layers.items():
        if name not in found:
            raise UserError(f"{name} is missing in the exported LoRA: not written")
        delta, magnitude = found[name]
        wanted = layer.delta()
        limit = 1e-5 * max(1e-6, float(wanted.abs().max()))
        wrong = delta.shape != wanted.shape or not float((delta - wanted).abs().max()) <= limit
        if layer.magnitude is not None:
            wrong |= magnitude is None or not torch.allclose(magnitude.flatten(), layer.magnitude.flatten(), rtol=1e-5)
        if wrong:
            raise UserError(f"{name} differs in the exported LoRA: not written")
    for name in found.keys() - layers.keys():  # a part of a fused layer that has no adapter: left as it is
        delta, magnitude = found[name]
        still = magnitude is None or torch.allclose(magnitude.flatten(), row_norms(base_weight(backbone, name)).flatten(), rtol=1e-4)
        if float(delta.abs().max()) > 0 or not still:
            raise UserError(f"{name} is changed by the exported LoRA, and should not be: not written")


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each output's weights, (outputs,), on the CPU."""
    return weight.cpu().float().flatten(1).norm(dim=1)
