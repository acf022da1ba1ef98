"""A run's parts built from its recipe, and its folder:

    runs/NAME/config.yaml     the resolved recipe: reproduces the run
              metrics.jsonl   losses by step         tensorboard/   the same, for TensorBoard
              samples/        grids at intervals     checkpoints/   to resume from
              student/        the exported pipeline  lora/          the exported adapter
              results.json  samples.png  report.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from distill import checkpoint
from distill.config import Config, load_config
from distill.denoiser import BackboneDenoiser
from distill.errors import UserError
from distill.loading import load_pipeline
from distill.losses.adversarial import Discriminator
from distill.methods.base import Method
from distill.roles import Adapters, LoRA, Roles, build_roles
from distill.student import Student
from distill.teacher import Teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Parts:
    """The networks of a run."""

    teacher: Teacher
    roles: Roles
    adapters: Adapters | None
    student: Student


def load_teacher(config: Config, device: torch.device | str = "cpu") -> Teacher:
    """The recipe's teacher, parity-checked."""
    section = config.teacher
    pipeline = load_pipeline(
        section.pipeline, dtype=DTYPES[section.dtype], device=device, trust_remote_code=section.trust_remote_code,
        revision=section.revision, variant=section.variant,
    )
    teacher = Teacher(pipeline)
    teacher.check(1e-5 if section.dtype == "float32" else 5e-2)
    return teacher


def build(config: Config, device: torch.device | str = "cpu") -> Parts:
    """Teacher, roles and student of a run, as they are before the first step."""
    return assemble(config, load_teacher(config, device))


def assemble(config: Config, teacher: Teacher) -> Parts:
    """The roles and the student of a run beside a teacher that is there already (``plan`` brings one without weights)."""
    lora = None
    if config.student.weights == "lora":
        section = config.student.lora
        rank = section.rank if section else 64
        alpha = section.alpha if section and section.alpha else float(rank)
        lora = LoRA(rank, alpha, tuple(section.targets) if section and section.targets else None)
    method = config.method
    roles, adapters = build_roles(teacher, method.roles, lora, method.guidance_embedding())
    roles.state = {k: v.to(teacher.device) for k, v in method.initial_state().items()}
    roles.discriminator = _discriminator(method, teacher, roles)
    assert isinstance(roles.student, BackboneDenoiser)
    return Parts(teacher, roles, adapters, Student(teacher, roles.student, method.sampler(), adapters))


@torch.no_grad()
def _discriminator(method: Method, teacher: Teacher, roles: Roles) -> Discriminator | None:
    """Heads for the features that the method wants judged; their shapes are read from one forward pass."""
    wanted = method.discriminator_features()
    if wanted is None:
        return None
    role, layers = wanted
    network = getattr(roles, role)
    probe = teacher.condition([teacher.placeholder()])
    noise = torch.zeros(1, *teacher.sample_shape, device=teacher.device)
    try:
        features = network.predict(noise, torch.tensor(0.5), probe, layers).features
    except AttributeError:
        inside = [n for n, _ in network.backbone.named_children()]
        raise UserError(f"method.gan.layers: {', '.join(layers)}: no such module in {type(network.backbone).__name__}; it has {', '.join(inside)}") from None
    return Discriminator({name: f.shape[1:] for name, f in features.items()}).to(teacher.device)


def is_run(path: Path) -> bool:
    """Whether a folder is a training run."""
    return (path / "config.yaml").is_file() and not (path / "model_index.json").is_file()


def load_student(folder: Path, device: torch.device | str = "cpu") -> tuple[Student, Config]:
    """The student of a run from its newest checkpoint (the averaged weights where there are any), and the run's recipe.

    Raises:
        UserError: if the folder is no run, has no checkpoint, or the checkpoint is corrupt.
    """
    if not is_run(folder):
        raise UserError(f"{folder} is not a training run: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    saved = checkpoint.steps(folder / "checkpoints")
    if not saved:
        raise UserError(f"{folder} has no checkpoint yet: train it first (distill train {folder} --resume)")
    tensors, _ = checkpoint.load(folder / "checkpoints", saved[-1])
    parts = build(config, device)
    source = "ema" if config.student.ema else "student"
    restore(parts.student.denoiser.named_parameters(), tensors, source)
    return parts.student, config


@torch.no_grad()
def restore(parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Copy ``prefix/NAME`` of a checkpoint into the parameters NAME.

    Raises:
        UserError: if one is missing or of another shape: the checkpoint is of another recipe.
    """
    for name, parameter in parameters.items():
        value = tensors.get(f"{prefix}/{name}")
        if value is None or value.shape != parameter.shape:
            raise UserError(f"the checkpoint does not fit this recipe: {prefix}/{name} is {'missing' if value is None else 'of another shape'}")
        parameter.copy_(value)
