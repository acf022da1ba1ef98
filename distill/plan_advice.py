"""What to change so that a run fits a GPU: settings in order of harm, least first, each with what it saves.

Gradient checkpointing costs time alone; adapters in place of full weights, a smaller dtype or a quantized teacher cost some
quality; a batch of one costs time again, and offload most of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from distill.config import Config, LoRA, Optimizer
from distill.errors import UserError
from distill.plan import EIGHT_BIT, GIB, OPTIMIZER, Memory, Plan, make_plan

#: Of a GPU's memory: for the CUDA context, and for what the allocator cannot use because it lies in pieces.
CONTEXT, FRAGMENTED = 0.6 * GIB, 0.04
Setting = tuple[Config, Memory]


@dataclass(frozen=True)
class Step:
    """A setting that was tried, and the peak with it and all before it that are kept."""

    settings: tuple[str, ...]  #: as for ``--set``
    saves: int
    peak: int


@dataclass(frozen=True)
class Advice:
    """Whether a plan fits, and the settings with which it does."""

    gpu: int
    usable: int
    fits: bool
    steps: tuple[Step, ...] = ()
    chosen: tuple[str, ...] = ()  #: the settings of the first combination that fits; empty if none does

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "steps": [vars(step) for step in self.steps]}


def parse_gpu(text: str) -> int:
    """Bytes of "24GB", "24 GiB" or "24": the sizes on the boxes of GPUs count in powers of two.

    Raises:
        UserError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]) > 0:
        raise UserError(f"--gpu {text}: write its memory as 24GB")
    return round(float(found[1]) * GIB)


def usable(gpu: int) -> int:
    """What a run may allocate."""
    return max(0, round(gpu * (1 - FRAGMENTED) - CONTEXT))


def advise(config: Config, plan: Plan, gpu: int, planned: Callable[[Config, Memory], Plan] | None = None) -> Advice:
    """Try settings until the run fits.

    Args:
        plan: of the recipe as it is.
        planned: makes the plan of a recipe under other settings.
    """
    planned = planned or (lambda config, memory: make_plan(config, "cuda", memory))
    room = usable(gpu)
    if plan.peak <= room:
        return Advice(gpu, room, True)
    state: Setting = (config, Memory.of(config))
    steps: list[Step] = []
    for settings, changed in _options(state):
        state_then = changed(state)
        if state_then is None:
            continue
        try:
            then = _with_arithmetic(plan, state, state_then) or planned(*state_then)
        except UserError:  # this backbone has no such thing
            continue
        if then.peak < 0.99 * plan.peak:  # what saves nothing is not worth its harm
            steps.append(Step(settings(state[0]), plan.peak - then.peak, then.peak))
            state, plan = state_then, then
        if plan.peak <= room:
            break
    fits = plan.peak <= room
    return Advice(gpu, room, False, tuple(steps), tuple(s for step in _needed(steps, room) for s in step.settings) if fits else ())


def _needed(steps: list[Step], room: int) -> list[Step]:
    """The last step makes it fit; of those before it, the most harmful ones that were not needed are left out. What a setting
    saved among others is at most what leaving it out costs, if their effects add; with checkpointing (whose effect others
    depend on) that is not so, and it stays."""
    kept, peak = list(steps), steps[-1].peak
    for step in reversed(steps[1:-1]):
        if peak + step.saves <= room:
            kept.remove(step)
            peak += step.saves
    return kept


def _options(start: Setting) -> Iterator[tuple[Callable[[Config], tuple[str, ...]], Callable[[Setting], Setting | None]]]:
    """(how it is written, what it does; None where it changes nothing) in order of harm."""
    yield (lambda c: ("trainer.gradient_checkpointing=true",)), _checkpointing
    yield (lambda c: ("student.weights=lora",)), _lora
    yield (lambda c: ("teacher.dtype=bfloat16",)), _bfloat16
    yield (lambda c: tuple(f"optimizers.{role}.name=adamw8bit" for role in _optimizers(c))), _eight_bit
    yield (lambda c: ("trainer.batch_size=1", f"trainer.accumulate={c.trainer.batch_size * c.trainer.accumulate}")), _batch_of_one
    yield (lambda c: ("teacher.quantize=4bit",)), _quantized
    yield (lambda c: ("trainer.offload=true",)), _offload


def _checkpointing(setting: Setting) -> Setting | None:
    config, memory = setting
    return None if memory.checkpointing else (config, replace(memory, checkpointing=True))


def _lora(setting: Setting) -> Setting | None:
    config, memory = setting
    student = config.student
    of_its_own = student.architecture or student.train or student.freeze
    if student.weights == "lora" or config.critic.weights == "lora" or of_its_own or config.method.guidance_embedding():
        return None
    return config.model_copy(update={"student": student.model_copy(update={"weights": "lora", "lora": student.lora or LoRA()})}), memory


def _bfloat16(setting: Setting) -> Setting | None:
    config, memory = setting
    if config.teacher.dtype != "float32":
        return None
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"dtype": "bfloat16"})}), memory


def _optimizers(config: Config) -> list[str]:
    return [role for role in ("student", "critic", "discriminator") if getattr(config.optimizers, role) is not None]


def _eight_bit(setting: Setting) -> Setting | None:
    config, memory = setting
    sections: dict[str, Optimizer] = {role: getattr(config.optimizers, role) for role in _optimizers(config)}
    if all("8bit" in section.name or section.name == "sgd" for section in sections.values()):
        return None
    changed = {role: section.model_copy(update={"name": "adamw8bit"}) for role, section in sections.items()}
    return config.model_copy(update={"optimizers": config.optimizers.model_copy(update=changed)}), memory


def _batch_of_one(setting: Setting) -> Setting | None:
    config, memory = setting
    trainer = config.trainer
    if trainer.batch_size == 1:
        return None
    update = {"batch_size": 1, "accumulate": trainer.batch_size * trainer.accumulate}
    return config.model_copy(update={"trainer": trainer.model_copy(update=update)}), memory


def _quantized(setting: Setting) -> Setting | None:
    config, memory = setting
    student = config.student
    if memory.quantize == "4bit" or memory.offload or student.train or student.freeze or config.critic.weights == "lora":
        return None
    return config, replace(memory, quantize="4bit")


def _offload(setting: Setting) -> Setting | None:
    config, memory = setting
    if memory.offload or "lora" in (config.student.weights, config.critic.weights):  # a shared backbone is never idle
        return None
    return config, replace(memory, offload=True, quantize="none")


def _with_arithmetic(plan: Plan, before: Setting, after: Setting) -> Plan | None:
    """The plan after a change that no step has to be traced for: what stands does not move the moment of the peak."""
    names = {config.optimizers.student.name for config, _ in (before, after)}
    if before[1] == after[1] and len(names) == 2 and before[0].trainer == after[0].trainer and before[0].student == after[0].student:
        if before[0].teacher == after[0].teacher and OPTIMIZER in plan.memory and "8bit" in after[0].optimizers.student.name:
            trained = sum(row["trained"] for row in plan.parameters.values())
            return replace(plan, memory=plan.memory | {OPTIMIZER: round(EIGHT_BIT * trained)})
    return None
