"""LoRA and DoRA adapters: several roles on one shared backbone.

    LoRA   y = W x + (alpha / rank) B A x                     Hu et al. 2021, arXiv 2106.09685
    DoRA   y = m (W + (alpha / rank) B A) x / ‖W + …‖_row     Liu et al. 2024, arXiv 2402.09353

B starts at zero and m at the norms of W's rows, so that a fresh adapter changes nothing. The teacher is "adapters off".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill.errors import UserError

ADAPTED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoRA:
    """Settings of the adapters: rank, alpha (strength = alpha/rank), the patterns of the layers that get one, and whether
    the rows' magnitudes are trained beside their directions (DoRA)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | None = None
    dora: bool = False


class Adapters:
    """PEFT adapters on one backbone, switched per forward without touching what is trainable.

    PEFT's own ``set_adapter`` also freezes the inactive adapters, which would stop the critic's training whenever the
    student runs; so the active adapter is set on the layers directly. The adapters' weights are float32 whatever the
    backbone's dtype: a small step on a half-precision weight would be rounded away.
    """

    def __init__(self, backbone: nn.Module, settings: LoRA, names: Sequence[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.settings, self.backbone, self.active = settings, backbone, None
        self.targets = lora_targets(backbone, settings.targets)
        if settings.dora:  # a row of zeros has no direction: its magnitude over its norm would be 0/0
            self.targets = [name for name in self.targets if not _has_empty_row(backbone.get_submodule(name))]
        alpha: Any = settings.alpha  # PEFT divides it by the rank: a fraction is fine, whatever the annotation says
        config = LoraConfig(
            r=settings.rank, lora_alpha=alpha, target_modules=self.targets, lora_dropout=0.0, init_lora_weights=True, use_dora=settings.dora,
        )
        backbone.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # they are merged on the whole teacher
            for name in names:
                inject_adapter_in_model(config, backbone, adapter_name=name)
        self.layers: list[Any] = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self.layers:
            _in_float32(layer, names)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self._activate(None)

    active: str | None  #: the adapter in use; None: the bare backbone

    def named_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the backbone, without the adapter's own: ``….lora_A.weight``,
        ``….lora_B.weight`` and, for DoRA, ``….lora_magnitude_vector.weight``."""
        own = f".{adapter}."
        return {n.replace(own, "."): p for n, p in self.backbone.named_parameters() if "lora_" in n and own in n}

    def _activate(self, adapter: str | None) -> None:
        self.active = adapter
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """One adapter in use (None: the bare backbone), and the one before again at the end."""
        before = self.active
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(before)

    @contextmanager
    def mixed(self, parts: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """For forwards without gradients on a batch of several parts, (adapter, samples) each; None: the bare backbone.

        A layer inside may have several rows per sample, one sample's after another's.
        """
        total = sum(samples for _, samples in parts)

        def names(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            rows = len(args[0])
            if rows % total:
                raise ValueError(f"a layer computes {rows} rows for {total} samples, and which adapter each wants cannot be told")
            return args, kwargs | {"adapter_names": [name or "__base__" for name, samples in parts for _ in range(samples * (rows // total))]}

        handles = [layer.register_forward_pre_hook(names, with_kwargs=True) for layer in self.layers]
        try:
            with self.using(next(name for name, _ in parts if name is not None)):  # any: the names decide
                yield
        finally:
            for handle in handles:
                handle.remove()

    def use(self, adapter: str | None) -> Callable[[], Any]:
        """A context for one forward; None: the bare backbone."""
        return lambda: self.using(adapter)


def _has_empty_row(layer: nn.Module) -> bool:
    weight = layer.get_parameter("weight")
    return weight.is_floating_point() and not weight.is_meta and not bool(weight.detach().flatten(1).any(dim=1).all())


@torch.no_grad()
def _in_float32(layer: Any, names: Sequence[str]) -> None:
    """An adapted layer's adapters in float32; DoRA's magnitudes are taken anew, for their rounding would be an effect."""
    for name in names:
        for holder in (layer.lora_A, layer.lora_B):
            holder[name].float()
        magnitude = layer.lora_magnitude_vector
        if name in magnitude:
            magnitude[name].update_layer(
                base_layer=layer.get_base_layer(), lora_A=layer.lora_A[name].weight, lora_B=layer.lora_B[name].weight, scaling=layer.scaling[name],
            )
            magnitude[name].float()


def lora_targets(backbone: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Full names of the layers that get an adapter.

    Args:
        patterns: a layer is taken if its name ends with one of them, at a dot; None: every linear and convolution inside
            the blocks (not the input, output and embedding layers around them). Grouped convolutions are left out: an
            adapter on one cannot be merged.

    Raises:
        UserError: if a pattern fits no layer.
    """
    layers = {n: m for n, m in backbone.named_modules() if isinstance(m, ADAPTED_LAYERS)}
    if patterns is None:
        plain = [n for n, m in layers.items() if getattr(m, "groups", 1) == 1]
        return [n for n in plain if inside_a_block(n)] or plain
    chosen: list[str] = []
    for pattern in patterns:
        fitting = [n for n in layers if n == pattern or n.endswith("." + pattern)]
        if not fitting:
            raise UserError(f"student.lora.targets: no layer of {type(backbone).__name__} is named {pattern!r}")
        chosen += fitting
    return sorted(set(chosen))


def inside_a_block(name: str) -> bool:
    """Whether a module lies in one of the backbone's repeated blocks: its path holds an index, as in
    ``down_blocks.0.resnets.1.conv1`` or ``transformer_blocks.3.attn.to_q``."""
    return any(part.isdigit() for part in name.split("."))
