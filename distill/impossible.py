"""Combinations of student kinds and memory options that no run can satisfy, found from the recipe alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distill import yamltree
from distill.attention import missing_xformers
from distill.config import Config
from distill.quantize import missing_package, package_of


def impossible_student(config: Config) -> Iterator[tuple[yamltree.KeyPath, str]]:
    """What the kinds of students exclude."""
    student = config.student
    parts = [key for key in ("train", "freeze") if getattr(student, key) is not None]
    if student.weights == "lora":
        for key in parts:
            yield ("student", key), "chooses among full weights: for a LoRA student choose layers with student.lora.targets"
        if student.architecture is not None:
            yield ("student", "architecture"), "needs weights of its own, and a LoRA student shares the teacher's: set student.weights: full"
    if student.architecture is not None and parts:
        yield ("student", parts[0]), "shares what is frozen with the teacher, and a student of another architecture shares nothing: leave out one of the two"
    if not student.ema:
        for key, default in (("ema_dtype", "float32"), ("ema_device", "same")):
            if getattr(student, key) != default:
                yield ("student", key), "is set, but there are no averaged weights: student.ema is 0"


def _apart(config: Config) -> str | None:
    """Why teacher and critic cannot be asked in one call."""
    student, method = config.student, config.method
    if student.weights != "lora":
        return "needs a backbone that the roles share: set student.weights: lora, or leave it out"
    if student.lora is not None and student.lora.dora:
        return "does not go with DoRA, whose layers take one adapter per call: set student.lora.dora: false, or leave it out"
    if config.trainer.compile:
        return "does not go with trainer.compile: choose one"
    why = None
    if "critic" not in method.roles:
        why = "has no critic"
    elif getattr(method, "divergence", "reverse_kl") != "reverse_kl":
        why = "reads hidden features with the scores"
    elif getattr(method, "objective", "kl") != "kl":
        why = "is differentiated through both networks"
    if why is not None:
        return f"has nothing to join: method {method.name} as set here {why}; leave it out"
    return None


def impossible_critic(config: Config) -> Iterator[tuple[yamltree.KeyPath, str]]:
    """What an adapter for the critic alone excludes."""
    critic = config.critic
    if critic.weights == "same":
        if critic.lora is not None:
            yield ("critic", "lora"), "is set, but critic.weights is same: set critic.weights: lora, or leave it out"
        return
    if "critic" not in config.method.roles:
        yield ("critic", "weights"), f"method {config.method.name} as set here trains no critic: leave it out"
    if config.student.weights == "lora":
        yield ("critic", "weights"), "is for a student with full weights: beside a LoRA student the critic is an adapter already, with student.lora's settings"
    if config.teacher.quantize != "none":
        yield ("teacher", "quantize"), "does not go with critic.weights: lora: use a LoRA student, whose critic is an adapter too"
    if config.trainer.offload:
        yield ("trainer", "offload"), "finds nothing to move: the critic is an adapter on the teacher, which is never idle"


def impossible_memory(config: Config) -> Iterator[tuple[yamltree.KeyPath, str]]:
    """What the memory options exclude, and what they need that is not here."""
    student, trainer, quantize = config.student, config.trainer, config.teacher.quantize
    cuda = torch.cuda.is_available() and trainer.device in ("auto", "cuda")
    if quantize != "none":
        if student.train is not None or student.freeze is not None:
            yield ("teacher", "quantize"), "quantises weights that the student's frozen layers share: leave out one of the two"
        if quantize != "4bit" and student.lora is not None and student.lora.dora:
            yield ("teacher", "quantize"), f"DoRA does not work on {'8-bit' if quantize == '8bit' else quantize} layers: use 4bit, or student.lora.dora: false"
        if trainer.offload:
            yield ("trainer", "offload"), "quantised weights stay on the device: leave out teacher.quantize or trainer.offload"
        if trainer.compile:
            yield ("trainer", "compile"), "quantised layers are not compiled: leave out teacher.quantize or trainer.compile"
        problem = missing_package(package_of(quantize))
        if problem:
            yield ("teacher", "quantize"), problem
    if trainer.batched_roles:
        problem = _apart(config)
        if problem:
            yield ("trainer", "batched_roles"), problem
    if trainer.offload and student.weights == "lora":
        yield ("trainer", "offload"), "finds nothing to move: the roles of a LoRA student share one backbone, which is never idle"
    if trainer.gradient_checkpointing and trainer.compile:
        yield ("trainer", "gradient_checkpointing"), "does not go with trainer.compile: choose one"
    if trainer.attention == "xformers":
        problem = missing_xformers() or (None if cuda else "xformers needs a CUDA device: set trainer.device: cuda, or attention: sdpa")
        if problem:
            yield ("trainer", "attention"), problem
    if trainer.attention == "flash":
        if not cuda:
            yield ("trainer", "attention"), "flash needs a CUDA device, and none is used here: set attention: sdpa"
        elif config.teacher.dtype == "float32" and trainer.mixed_precision == "no":
            yield ("trainer", "attention"), "flash computes in 16 bit: set trainer.mixed_precision: bf16 or teacher.dtype: bfloat16, or attention: sdpa"
    for role in ("student", "critic", "discriminator"):
        section = getattr(config.optimizers, role)
        if section is not None and section.name == "adamw8bit":
            problem = missing_package() or (None if cuda else "needs a CUDA device, and none is used here: use adamw")
            if problem:
                yield ("optimizers", role, "name"), f"adamw8bit {problem}"
