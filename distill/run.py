"""A run's parts built from its recipe, and its folder:

    runs/NAME/config.yaml     the resolved recipe: reproduces the run
              metrics.jsonl   losses by step         tensorboard/   the same, for TensorBoard
              samples/        grids at intervals     checkpoints/   to resume from
              student/        the exported pipeline  lora/          the exported adapter
              results.json  samples.png  report.html
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.adapters import Adapters, LoRA
from distill.attention import use_attention
from distill.config import Config, load_config
from distill.config import LoRA as LoRASettings
from distill.denoiser import BackboneDenoiser, Condition, Denoiser
from distill.errors import UserError
from distill.experts import ByCondition, Routed, find_route, networks_of
from distill.loading import load_pipeline
from distill.losses.adversarial import Discriminator, condition_vector, feature_body
from distill.memory import Offload, checkpoint_activations, offload
from distill.methods.base import Method
from distill.overrides import find_override
from distill.quantize import quantize
from distill.recording import find_backbone
from distill.roles import Roles, build_roles
from distill.selection import Selection
from distill.student import Student
from distill.teacher import Teacher
from distill.together import Question, Together

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: what a trained student is loaded with: nothing of its training, so that it loads also where it could not be trained
AS_SAMPLED = ("teacher.quantize=none", "trainer={}", "optimizers={}")


@dataclass
class Parts:
    """The networks of a run."""

    teacher: Teacher
    roles: Roles
    adapters: Adapters | None  #: on the teacher's backbone: those of a LoRA student and its critic, or the critic's alone
    student: Student
    waiting: list[Offload] = field(default_factory=list)  #: networks whose weights are on the CPU between uses

    def rest(self) -> None:
        """Send idle weights away: no graph is alive."""
        for network in self.waiting:
            network.rest()


def mixed_precision(config: Config) -> str:
    """How a run computes. The gradients of a float16 network vanish without the loss scale that comes with "fp16"."""
    return "fp16" if config.teacher.dtype == "float16" else config.trainer.mixed_precision


def load_teacher(config: Config, device: torch.device | str = "cpu") -> Teacher:
    """The recipe's teacher, parity-checked. With LoRA a quantised one is quantised before it comes to the device."""
    section = config.teacher
    early = section.quantize if config.student.weights == "lora" else "none"
    pipeline = load_pipeline(
        section.pipeline, dtype=DTYPES[section.dtype], device=device if early == "none" else "cpu", trust_remote_code=section.trust_remote_code,
        revision=section.revision, variant=section.variant,
    )
    if early != "none":
        quantize(find_backbone(pipeline)[1], early, device)
        pipeline.to(device)
    teacher = Teacher(pipeline, section.call, find_override(section.override, type(pipeline).__name__))
    teacher.check(1e-5 if section.dtype == "float32" else 5e-2)
    return teacher


def build(config: Config, device: torch.device | str = "cpu") -> Parts:
    """Teacher, roles and student of a run, as they are before the first step."""
    return assemble(config, load_teacher(config, device))


def assemble(config: Config, teacher: Teacher) -> Parts:
    """The roles and the student of a run beside a teacher that is there already (``plan`` brings one without weights)."""
    student, method, bits = config.student, config.method, config.teacher.quantize
    selection = Selection(tuple(student.train or ()), tuple(student.freeze or ())) if student.train or student.freeze else None
    roles, adapters = build_roles(
        teacher, method.roles, _lora(config), method.guidance_embedding(), selection=selection, architecture=student.architecture,
        critic_lora=_settings(config.critic.lora) if config.critic.weights == "lora" else None,
        like_teacher=method.like_teacher, route=find_route(method.experts(), teacher), end_time=method.end_time(),
    )
    if adapters is None and bits != "none":  # the copies have been made
        quantize(teacher.backbone, bits, teacher.device)
    if student.architecture is not None:
        _try_out(teacher, roles.student, "student.architecture: a student of this architecture does not work as the teacher does")
    if config.trainer.batched_roles and adapters is not None:
        roles.together = _together(teacher, roles, adapters)
    waiting = _economize(config, teacher, roles, adapters)
    roles.state = {k: v.to(teacher.device) for k, v in (method.initial_state() | method.state_of(roles)).items()}
    roles.extra = _extra_conditions(method, teacher)
    roles.discriminator = _discriminator(method, teacher, roles)
    roles.decode = teacher.decode_with_gradient
    assert isinstance(roles.student, BackboneDenoiser | Routed)
    own = adapters if student.weights == "lora" else None
    return Parts(teacher, roles, adapters, Student(teacher, roles.student, method.sampler(), own), waiting)


def _extra_conditions(method: Method, teacher: Teacher) -> Condition | None:
    """Those of the inputs that the method names in its settings.

    Raises:
        UserError: if the teacher takes no such inputs.
    """
    inputs = method.extra_inputs()
    for given in inputs:
        if teacher.input_name == "prompt" and not isinstance(given, str):
            raise UserError(f"method: {given!r} is not a prompt, which this teacher takes")
        if teacher.input_name == "class_labels" and not (isinstance(given, int) and 0 <= given < (teacher.classes or given + 1)):
            raise UserError(f"method: {given!r} is not one of this teacher's classes" + (f", 0 to {teacher.classes - 1}" if teacher.classes else ""))
        if teacher.input_name is None:
            raise UserError(f"method: {given!r} is no input of this teacher, which is unconditional")
    return teacher.condition(inputs) if inputs else None


def _lora(config: Config) -> LoRA | None:
    return _settings(config.student.lora) if config.student.weights == "lora" else None


def _settings(section: LoRASettings | None) -> LoRA:
    section = section or LoRASettings()
    return LoRA(section.rank, section.alpha or float(section.rank), tuple(section.targets) if section.targets else None, section.dora)


@torch.no_grad()
def _together(teacher: Teacher, roles: Roles, adapters: Adapters) -> Together:
    """Teacher and critic in one call, and a proof that it gives what two calls give; with a made-up critic, for a fresh one
    is the teacher.

    Raises:
        UserError: if it does not: some backbones mix the samples of a batch, or lay several samples' rows among each other.
    """
    assert roles.critic is not None
    own = teacher.denoiser
    made = Together(BackboneDenoiser(own.backbone, own.schedule, own.kind, own.call, companions=own.companions), adapters)
    if any(p.is_meta for p in own.backbone.parameters()):  # a plan's networks have no values
        return made
    fresh = {p: p.detach().clone() for p in roles.parameters("critic")}
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *teacher.sample_shape, generator=draw).to(teacher.device), torch.tensor(0.5)
    told = teacher.condition([teacher.placeholder()] * 2)
    try:
        for p in fresh:
            p.add_(0.02 * torch.randn(p.shape, generator=draw).to(p))
        apart = [own.predict(x, t, told).value, roles.critic.predict(x, t, told).value]
        both = made.ask([Question(None, x, t, told), Question("critic", x, t, told)])
        assert both is not None  # of equal conditions
        difference = max(float((a - b.value).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(apart, both, strict=True))
    except ValueError as error:
        raise UserError(f"trainer.batched_roles: {type(own.backbone).__name__} does not work with it ({error}): set it to false") from None
    finally:
        for p, before in fresh.items():
            p.copy_(before)
    if not difference <= (1e-3 if own.dtype == torch.float32 else 5e-2):
        raise UserError(f"trainer.batched_roles: {type(own.backbone).__name__} answers otherwise in one call (by {difference:.0e}): set it to false")
    return made


def _economize(config: Config, teacher: Teacher, roles: Roles, adapters: Adapters | None) -> list[Offload]:
    """Apply the trainer's memory options to the networks; those that now wait on the CPU."""
    settings = config.trainer
    networks = [n for role in (roles.teacher, roles.student, roles.critic, roles.winner, roles.target) for n in networks_of(role)]
    apart = list({id(n.backbone): n for n in networks}.values())  #: one per backbone
    for network in apart:
        use_attention(network.backbone, settings.attention, teacher.device)
    if settings.attention != "default":
        with _as_trained(config, teacher.device):
            _try_out(teacher, roles.student, f"trainer.attention: {settings.attention} does not work with this backbone")
    if settings.gradient_checkpointing:
        _checkpoint(teacher, roles.student, networks, adapters)
    if not settings.offload:
        return []
    idle = [*networks_of(roles.teacher), *networks_of(roles.target)]
    busy = [p for n in networks if n not in idle for p in n.backbone.parameters()]
    return [waiting for n in idle if (waiting := offload(n, busy, teacher.device)) is not None]


def _as_trained(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of the run's training."""
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision(config))
    return nullcontext() if narrow is None else torch.autocast(device.type, narrow)


def _checkpoint(teacher: Teacher, student: Denoiser, networks: Sequence[BackboneDenoiser], adapters: Adapters | None) -> None:
    """Checkpoint the backbones' activations, and see that they still compute the same.

    Raises:
        UserError: if not: some classes leave an argument out on that path (an attention mask, in some releases of diffusers).
    """
    what = f"trainer.gradient_checkpointing: {type(teacher.backbone).__name__} does not work with it, set it to false"
    measurable = not any(p.is_meta for p in teacher.backbone.parameters())  # a plan's networks have no values
    before = _try_out(teacher, student, what) if measurable else None
    for network in {id(n.backbone): n for n in networks}.values():
        ends = [n.end_time for n in networks if n.backbone is network.backbone and n.end_time is not None]
        checkpoint_activations(network.backbone, adapters or network.masters, *ends)
    if before is None:
        return
    difference = float((_try_out(teacher, student, what) - before).abs().max() / before.abs().max().clamp_min(1e-6))
    if not difference <= 1e-3:
        raise UserError(f"{what}: its output changes by {difference:.0e}, for the class leaves something out on that path")


def _try_out(teacher: Teacher, network: Denoiser, what: str) -> Tensor:
    """The output of one forward pass of a network, as it runs in training.

    Raises:
        UserError: if it fails, or gives another shape than the teacher's samples have.
    """
    noise = torch.zeros(1, *teacher.sample_shape, device=teacher.device)
    try:
        with torch.enable_grad():
            value = network.predict(noise, torch.tensor(0.5), teacher.condition([teacher.placeholder()])).value
    except Exception as error:  # what a network that does not fit raises is anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what}: {reason}") from None
    if value.shape != noise.shape:
        raise UserError(f"{what}: its output is {tuple(value.shape[1:])}, not {tuple(noise.shape[1:])}")
    return value.detach()


@torch.no_grad()
def _discriminator(method: Method, teacher: Teacher, roles: Roles) -> Discriminator | None:
    """Heads for the features that the method wants judged; their shapes are read from one forward pass."""
    wanted = method.discriminator_features()
    if wanted is None:
        return None
    host, layers = wanted
    noise, t = torch.zeros(2, *teacher.sample_shape, device=teacher.device), torch.tensor(0.5)
    if host in ("critic", "teacher"):
        network = getattr(roles, host)
        try:
            features = network.predict(noise[:1], t, teacher.condition([teacher.placeholder()]), layers).features
        except AttributeError:
            inside = [n for n, _ in network.backbone.named_children()]
            name = type(network.backbone).__name__
            raise UserError(f"method.gan.layers: {', '.join(layers)}: no such module in {name}; it has {', '.join(inside)}") from None
        return Discriminator({name: f.shape[1:] for name, f in features.items()}).to(teacher.device)
    if host == "projected" and teacher.autoencoder is not None:
        raise UserError("method.gan.features: projected judges images, and this teacher's samples are latents: use teacher or critic")
    body = feature_body(host, teacher.sample_shape).to(teacher.device)
    features = body(noise, t.expand(2))
    told = condition_vector(teacher.condition([teacher.placeholder()]).values, 1, teacher.device).shape[1]
    return Discriminator({name: f.shape[1:] for name, f in features.items()}, body=body, told=told).to(teacher.device)


def is_run(path: Path) -> bool:
    """Whether a folder is a training run."""
    return (path / "config.yaml").is_file() and not (path / "model_index.json").is_file()


def load_student(folder: Path, device: torch.device | str = "cpu") -> tuple[Student, Config]:
    """The student of a run from its newest checkpoint (the averaged weights where there are any), and the run's recipe but
    for the sections that concern its training alone.

    A LoRA that was trained on a quantised teacher comes on the teacher as it is: what is exported is not quantised.

    Raises:
        UserError: if the folder is no run, has no checkpoint, or the checkpoint is corrupt.
    """
    if not is_run(folder):
        raise UserError(f"{folder} is not a training run: it has no config.yaml")
    config = load_config(folder / "config.yaml", AS_SAMPLED)
    saved = checkpoint.steps(folder / "checkpoints")
    if not saved:
        raise UserError(f"{folder} has no checkpoint yet: train it first (distill train {folder} --resume)")
    tensors, facts = checkpoint.load(folder / "checkpoints", saved[-1])
    parts = build(config, device)
    restore_route(parts.roles, facts)
    source = "ema" if config.student.ema else "student"
    restore(parts.student.denoiser.named_parameters(), tensors, source)
    return parts.student, config


def restore_route(roles: Roles, facts: dict[str, Any]) -> None:
    """The partition of conditions that a checkpoint's networks were trained for."""
    if isinstance(roles.student, Routed) and facts.get("route") is not None:
        roles.student.route = ByCondition.from_facts(facts["route"])


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], prefix: str) -> None:
    """Copy ``prefix/NAME`` of a checkpoint into the parameters NAME.

    Raises:
        UserError: if one is missing or of another shape: the checkpoint is of another recipe.
    """
    for name, parameter in parameters.items():
        value = tensors.get(f"{prefix}/{name}")
        if value is None or value.shape != parameter.shape:
            raise UserError(f"the checkpoint does not fit this recipe: {prefix}/{name} is {'missing' if value is None else 'of another shape'}")
        parameter.copy_(value)
