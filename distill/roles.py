"""The networks of a training run: teacher, student, critic, target, discriminator.

With full weights each trained role is a copy of the teacher's backbone, in float32 whatever the teacher's dtype (see
``masters.py``); where only selected layers are trained, the rest of it is the teacher's own memory; the critic alone may be an
adapter on the teacher (VSD). With LoRA all of them are adapters on one shared backbone: the teacher is "adapters off", so that
three networks cost the memory of one (and a few adapters). A student of a smaller architecture is a network of its own. A student of
several networks (``experts.py``) has a copy, or an adapter, for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.adapters import Adapters, LoRA
from distill.denoiser import BackboneDenoiser, Call, Condition, Denoiser
from distill.errors import UserError
from distill.experts import Route, Routed
from distill.losses.adversarial import Discriminator
from distill.masters import Masters
from distill.schedule import NoiseSchedule
from distill.selection import Selection, share, shared_copy
from distill.smaller import shrunk
from distill.teacher import Teacher
from distill.together import Together
from distill.two_time import NAME as END_TIME
from distill.two_time import end_time_embedding

GUIDANCE_WEIGHT = "time_embedding.cond_proj.weight"  #: of a guidance embedding, in diffusers' UNets


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
    winner: Denoiser | None = None  #: a second critic, of the samples that win a comparison
    state: dict[str, Tensor] = field(default_factory=dict)
    extra: Condition | None = None  #: of ``Method.extra_inputs``
    decode: Callable[[Tensor], Tensor] | None = None  #: x0 → images in [0, 1], differentiable
    together: Together | None = None  #: asks teacher and critic in one call, where the run is to do so
    forget: Callable[[str], None] | None = None  #: drops what a role's optimizer remembers: its weights begin anew

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
        return [r for r in ("student", "critic", "winner", "discriminator") if self.parameters(r)]


@torch.no_grad()
def average(target: Iterable[Tensor], source: Iterable[Tensor], decay: float, seed: int | None = None) -> None:
    """target ← decay · target + (1 − decay) · source, in place; also across devices and dtypes.

    Args:
        seed: in bfloat16 a step of one part in a thousand is less than the gap to the next number, and rounding to the
            nearest would lose it every time. With a seed the result is rounded up or down at random, right on average.
    """
    targets, sources = list(target), list(source)
    if all(t.device == s.device and t.dtype == s.dtype and (seed is None or t.dtype != torch.bfloat16) for t, s in zip(targets, sources, strict=True)):
        torch._foreach_lerp_(targets, sources, 1 - decay)
        return
    generators: dict[torch.device, torch.Generator] = {}
    for t, s in zip(targets, sources, strict=True):
        exact = torch.lerp(t.float(), s.to(t.device).float(), 1 - decay)
        if t.dtype == torch.bfloat16 and seed is not None:
            generator = generators.setdefault(t.device, torch.Generator(t.device).manual_seed(seed))
            exact = round_at_random(exact, generator)
        t.copy_(exact)


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 numbers on bfloat16's grid, rounded to a neighbour with the probability of its nearness: E[result] = x."""
    # bfloat16 is float32 without its last 16 bits: noise there carries over with the wanted probability.
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


# -- building -----------------------------------------------------------------------------------------------------------


def build_roles(
    teacher: Teacher, wanted: Sequence[str], lora: LoRA | None = None, guidance_embedding: int = 0, *,
    selection: Selection | None = None, architecture: Mapping[str, Any] | None = None, critic_lora: LoRA | None = None,
    like_teacher: Sequence[str] = ("critic", "winner"), route: Route | None = None, end_time: bool = False,
) -> tuple[Roles, Adapters | None]:
    """The teacher and the wanted roles ("student", "critic", "winner", "target"), all starting from the teacher's weights.

    Args:
        lora: adapters on the teacher's own backbone in place of copies.
        guidance_embedding: width of a guidance embedding that the student (and target) get and the teacher lacks.
        selection: the parameters that are trained, in the student and in the critic; all others are the teacher's own
            tensors. A guidance embedding is trained in any case.
        architecture: settings of the backbone's config that make the student (and target) smaller; the critic follows
            the student's distribution against the teacher's and keeps the teacher's architecture.
        critic_lora: an adapter on the teacher's own backbone for the critic, beside copies for the others.
        like_teacher: the roles that keep it.
        route: the student (and target) is made of several networks, among which this chooses.
        end_time: the student (and target) is told where a jump ends, by an embedding that is trained in any case.

    Raises:
        UserError: if the backbone cannot be given what is asked for.
    """
    denoiser = teacher.denoiser
    # Found before adapters are put into the backbone; each network gets one of its own.
    fresh: list[Any] = [end_time_embedding(teacher, denoiser)] if end_time and lora is not None else []

    def ends(role: str, network: BackboneDenoiser) -> Any:
        if not end_time or role in like_teacher:
            return None
        if not fresh:
            fresh.append(end_time_embedding(teacher, network))
        return copy.deepcopy(fresh[0])

    if lora is not None:
        if guidance_embedding:
            raise UserError("a LoRA student cannot be given a guidance embedding: set student.weights: full")
        adapted, adapters = _adapted(denoiser, lora, wanted, like_teacher, route, ends)
        return Roles(denoiser, **adapted), adapters
    trained = None if selection is None else selection.names(denoiser.backbone)
    on_teacher = [role for role in wanted if role == "critic" and critic_lora is not None]
    made: dict[str, Any] = {}
    for role in wanted:
        if role in on_teacher:
            continue
        follows_student = role not in like_teacher
        embed, changes = (guidance_embedding, architecture) if follows_student else (0, None)
        copies = [_copied(denoiser, embed, trained, changes, fixed=role == "target") for _ in range(1 if route is None or not follows_student else route.count)]
        for network in copies:
            _tell_end(network, ends(role, network), fixed=role == "target")
        made[role] = _joined(copies, route)
    if critic_lora is None or not on_teacher:
        return Roles(denoiser, **made), None
    critic, adapters = _adapted(denoiser, critic_lora, on_teacher, like_teacher, None, ends)  # after the copies, which have none
    return Roles(denoiser, **made, **critic), adapters


def _copied(
    teacher: BackboneDenoiser, guidance_embedding: int, trained: Sequence[str] | None, architecture: Mapping[str, Any] | None, fixed: bool
) -> BackboneDenoiser:
    """A network of a role's own, started from the teacher's weights; ``fixed``: no gradient changes it."""
    backbone, call = copy_backbone(teacher.backbone, teacher.call, guidance_embedding, trained, architecture)
    chosen = [n for n, _ in backbone.named_parameters() if trained is None or n in trained or (guidance_embedding and n == GUIDANCE_WEIGHT)]
    backbone.requires_grad_(False)
    masters = Masters(backbone, [backbone.get_parameter(n) for n in chosen]) or None
    own = {n: backbone.get_parameter(n) for n in chosen}
    for parameter in own.values():
        parameter.requires_grad_(not fixed)
    use = nullcontext if masters is None else masters.using
    return BackboneDenoiser(backbone, teacher.schedule, teacher.kind, call, use, own, masters=masters)


def _joined(networks: Sequence[BackboneDenoiser], route: Route | None) -> Denoiser:
    """One role of one network or several."""
    return networks[0] if route is None or len(networks) == 1 else Routed(networks, route)


def adapter_name(role: str, k: int) -> str:
    """Of the adapter of a role's network k, from 0: student, student_2, …"""
    return role if k == 0 else f"{role}_{k + 1}"


def _adapted(
    teacher: BackboneDenoiser, lora: LoRA, wanted: Sequence[str], like_teacher: Sequence[str], route: Route | None,
    ends: Callable[[str, BackboneDenoiser], Any],
) -> tuple[dict[str, Any], Adapters]:
    """Roles that are adapters on the teacher's backbone; the teacher is "adapters off" from here on."""
    names = {r: [adapter_name(r, k) for k in range(1 if route is None or r in like_teacher else route.count)] for r in wanted}
    adapters = Adapters(teacher.backbone, lora, [name for several in names.values() for name in several])
    teacher.use = adapters.use(None)

    def network(role: str, name: str) -> BackboneDenoiser:
        made = BackboneDenoiser(teacher.backbone, teacher.schedule, teacher.kind, teacher.call, adapters.use(name), adapters.named_parameters(name))
        _tell_end(made, ends(role, made), fixed=role == "target")
        return made

    return {role: _joined([network(role, name) for name in several], route) for role, several in names.items()}, adapters


def _tell_end(network: BackboneDenoiser, embedding: Any, fixed: bool) -> None:
    """Attach an embedding of the end time (None: none) to a network; its weights are the network's from here on."""
    if embedding is None:
        return
    embedding.attach(network.backbone)
    embedding.requires_grad_(not fixed)
    own = {f"{END_TIME}.{name}": p for name, p in embedding.named_parameters()}
    network.end_time, network._trained = embedding, network.named_parameters() | own


def copy_backbone(
    backbone: nn.Module, call: Call, guidance_embedding: int = 0, trained: Sequence[str] | None = None, architecture: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Call]:
    """A copy in eval mode, and how it is called.

    Args:
        guidance_embedding: width of a guidance embedding where the backbone's class has one and the teacher none; its
            projection starts at zero, so that the copy equals the original at every guidance scale.
        trained: names of the parameters that are copied, the others being shared; None: all.
        architecture: changes of the config, see ``smaller.py``.
    """
    changes = dict(architecture or {})
    if not guidance_embedding:
        if changes:
            return shrunk(backbone, changes), call
        return (copy.deepcopy(backbone) if trained is None else shared_copy(backbone, trained)), call
    config: Any = backbone.config
    if "time_cond_proj_dim" not in config or config["time_cond_proj_dim"] is not None:
        raise UserError(f"{type(backbone).__name__} has no room for a guidance embedding: fix method.guidance_scale")
    made: Any = shrunk(backbone, {**changes, "time_cond_proj_dim": guidance_embedding}, new=(GUIDANCE_WEIGHT,))
    nn.init.zeros_(made.time_embedding.cond_proj.weight)
    if trained is not None:
        share(made, backbone, [n for n, _ in backbone.named_parameters() if n not in set(trained)])
    constants = {k: v for k, v in call.constants.items() if k != "timestep_cond"}
    return made, replace(call, constants=constants, guidance="timestep_cond")
