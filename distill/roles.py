"""The networks of a training run: teacher, student, critic, target, discriminator.

With full weights each trained role is a copy of the teacher's backbone. With LoRA all of them are adapters on one
shared backbone: the teacher is "adapters off", so that three networks cost the memory of one (and a few adapters).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import BackboneDenoiser, Call, Denoiser
from distill.errors import UserError
from distill.losses.adversarial import Discriminator
from distill.schedule import NoiseSchedule
from distill.teacher import Teacher

ADAPTED_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass
class Roles:
    """What a method's ``step`` sees. Roles that the method did not ask for are None.

    ``state`` holds the method's running statistics (``Method.initial_state``), checkpointed by the trainer.
    """

    teacher: Denoiser
    student: Denoiser
    critic: Denoiser | None = None
    target: Denoiser | None = None
    discriminator: Discriminator | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.teacher.schedule

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of a role; empty for one that does not exist."""
        holder = getattr(self, role, None)
        return [] if holder is None else list(holder.parameters())

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The same by name; the names are those on disk."""
        holder = getattr(self, role, None)
        if holder is None:
            return {}
        named = getattr(holder, "named_parameters", None)
        return dict(named()) if named else {str(i): p for i, p in enumerate(holder.parameters())}

    def trained(self) -> list[str]:
        """The roles that have parameters of their own and are changed by gradients."""
        return [r for r in ("student", "critic", "discriminator") if self.parameters(r)]


@torch.no_grad()
def average(target: Iterable[Tensor], source: Iterable[Tensor], decay: float) -> None:
    """target ← decay · target + (1 − decay) · source, in place."""
    targets, sources = list(target), list(source)
    torch._foreach_lerp_(targets, sources, 1 - decay)


# -- LoRA ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRA:
    """Settings of the adapters: rank, alpha (strength = alpha/rank) and the patterns of the layers that get one."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | None = None


class Adapters:
    """PEFT adapters on one backbone, switched per forward without touching what is trainable.

    PEFT's own ``set_adapter`` also freezes the inactive adapters, which would stop the critic's training whenever the
    student runs; so the active adapter is set on the layers directly.
    """

    def __init__(self, backbone: nn.Module, settings: LoRA, names: Sequence[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.settings, self.backbone = settings, backbone
        self.targets = lora_targets(backbone, settings.targets)
        alpha: Any = settings.alpha  # PEFT divides it by the rank: a fraction is fine, whatever the annotation says
        config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=self.targets, init_lora_weights=True)
        backbone.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            for name in names:
                inject_adapter_in_model(config, backbone, adapter_name=name)
        self.layers: list[Any] = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self._activate(None)

    def named_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the backbone, without the adapter's own."""
        own = f".{adapter}."
        return {n.replace(own, "."): p for n, p in self.backbone.named_parameters() if "lora_" in n and own in n}

    def _activate(self, adapter: str | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    def use(self, adapter: str | None) -> Callable[[], Any]:
        """A context for one forward; None: the bare backbone."""

        @contextmanager
        def active() -> Iterator[None]:
            self._activate(adapter)
            try:
                yield
            finally:
                self._activate(None)

        return active


def lora_targets(backbone: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Full names of the layers that get an adapter.

    Args:
        patterns: a layer is taken if its name ends with one of them, at a dot; None: every Linear and Conv2d layer that
            lies inside a block (not the input, output and embedding layers at the top).

    Raises:
        UserError: if a pattern fits no layer.
    """
    names = [n for n, m in backbone.named_modules() if isinstance(m, ADAPTED_LAYERS)]
    if patterns is None:
        return [n for n in names if "." in n and not n.startswith(("time_embedding", "class_embedding"))]
    chosen: list[str] = []
    for pattern in patterns:
        fitting = [n for n in names if n == pattern or n.endswith("." + pattern)]
        if not fitting:
            raise UserError(f"student.lora.targets: no layer of {type(backbone).__name__} is named {pattern!r}")
        chosen += fitting
    return sorted(set(chosen))


# -- building -----------------------------------------------------------------------------------------------------------


def build_roles(
    teacher: Teacher, wanted: Sequence[str], lora: LoRA | None = None, guidance_embedding: int = 0,
) -> tuple[Roles, Adapters | None]:
    """The teacher and the wanted roles ("student", "critic", "target"), all starting from the teacher's weights.

    Args:
        lora: adapters on the teacher's own backbone in place of copies.
        guidance_embedding: width of a guidance embedding that the student (and target) get and the teacher lacks.
    """
    denoiser = teacher.denoiser
    if lora is not None:
        if guidance_embedding:
            raise UserError("a LoRA student cannot be given a guidance embedding: set student.weights: full")
        adapters = Adapters(denoiser.backbone, lora, wanted)
        teacher.denoiser.use = adapters.use(None)
        made: dict[str, Any] = {
            r: BackboneDenoiser(denoiser.backbone, denoiser.schedule, denoiser.kind, denoiser.call, adapters.use(r), adapters.named_parameters(r))
            for r in wanted
        }
        return Roles(denoiser, **made), adapters
    made = {}
    for role in wanted:
        embed = guidance_embedding if role in ("student", "target") else 0
        backbone, call = copy_backbone(denoiser.backbone, denoiser.call, embed)
        backbone.requires_grad_(role != "target")
        made[role] = BackboneDenoiser(backbone, denoiser.schedule, denoiser.kind, call)
    return Roles(denoiser, **made), None


def copy_backbone(backbone: nn.Module, call: Call, guidance_embedding: int = 0) -> tuple[nn.Module, Call]:
    """A copy in eval mode; with a guidance embedding of the given width (its projection starts at zero, so that the
    copy equals the original at every guidance scale) where the backbone's class has one."""
    if not guidance_embedding:
        return copy.deepcopy(backbone), call
    config: Any = backbone.config
    if "time_cond_proj_dim" not in config or config["time_cond_proj_dim"] is not None:
        raise UserError(f"{type(backbone).__name__} has no room for a guidance embedding: fix method.guidance_scale")
    made: Any = type(backbone).from_config(config, time_cond_proj_dim=guidance_embedding)  # type: ignore[attr-defined]
    first = next(backbone.parameters())
    made.load_state_dict(backbone.state_dict(), strict=False)
    nn.init.zeros_(made.time_embedding.cond_proj.weight)
    constants = {k: v for k, v in call.constants.items() if k != "timestep_cond"}
    return made.eval().to(first.device, first.dtype), replace(call, constants=constants, guidance="timestep_cond")
