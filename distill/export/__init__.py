"""A student as a diffusers folder or a LoRA that stock diffusers loads; proven by loading it and comparing the images.

Everything is written into a folder beside the target and renamed at the end: a failed export leaves nothing behind.

    export_diffusers   the teacher's class with a stock scheduler that was found to sample as the student does
    export_few_step    the same weights in a class of the folder's own: any ladder of times, no arguments
    export_lora        the adapter alone, in diffusers' names or in those of kohya and ComfyUI
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.experts import Routed
from distill.export import assembly, few_step, kohya, words
from distill.export.assembly import carry_code
from distill.export.calls import Plain, call_guidance, plain_call
from distill.export.files import VARIANTS, check_shard_size, read_facts, set_attributes, to_variant, write_facts, writing
from distill.export.lora import export_lora
from distill.export.proof import prove, reload
from distill.export.schedulers import NoStockScheduler, choose
from distill.export.tied import untied
from distill.loading import FACTS, FEW_STEP_FILE, load_pipeline, quiet
from distill.modelcard import license_of, model_card
from distill.resources import find
from distill.student import Student

__all__ = [
    "FACTS", "Format", "NoStockScheduler", "call_guidance", "carry_code", "check_forms", "export_diffusers", "export_few_step", "export_lora",
    "load_export", "read_facts",
]


@dataclass(frozen=True)
class Format:
    """How weights are written.

    Args:
        max_shard_size: largest size of one file (``"5GB"``); diffusers' own default where None.
        variant: ``"fp16"`` or ``"bf16"``: in half precision, under that variant's file names.
    """

    max_shard_size: str | None = None
    variant: str | None = None


def export_diffusers(
    student: Student, folder: Path, *, method: str, teacher_name: str, metrics: Sequence[dict[str, Any]] | None = None,
    overwrite: bool = False, format: Format = Format(),
) -> None:
    """Write the student as a folder of the teacher's pipeline class; a LoRA student is merged into a copy of its backbone.
    The few-step pipeline file is laid beside it, for those who want ``pipe(prompt)`` to need no arguments.

    Raises:
        NoStockScheduler: if no stock scheduler reproduces the sampler, or the student is made of several networks.
        UserError: if the folder cannot be written, or it holds something that is not an export (or is one, and
            ``overwrite`` is not set); if what was written is not the student.
    """
    check_shard_size(format.max_shard_size)
    if student.sampler.end_time:
        raise NoStockScheduler("no stock pipeline tells its network where a jump ends: use --to few-step")
    if isinstance(student.denoiser, Routed):
        raise NoStockScheduler(f"no stock pipeline chooses among {len(student.networks)} networks: use --to few-step")
    with writing(folder, overwrite) as temporary:
        backbone = assembly.merged(student)
        stock = choose(student, lambda scheduler: assembly.assemble(student, backbone, scheduler))
        pipeline = assembly.assemble(student, backbone, stock.scheduler)
        code = _save(pipeline, temporary, format)
        said: dict[str, Any] = {"form": "diffusers", "method": method, "teacher": teacher_name, "guidance_scale": call_guidance(student.sampler)}
        said["calls"] = {str(n): extra for n, extra in stock.calls.items()}
        said["attributes"] = {name: repr(value) for name, value in assembly.attributes(pipeline).items()}
        no_arguments = _needs_no_arguments(pipeline)
        arguments = {} if no_arguments else {student.teacher.steps_name: student.sampler.steps, **stock.plain, **stock.calls[student.sampler.steps]}
        write_facts(temporary, student.sampler, **said)
        changed = (student.teacher.backbone_name, student.teacher.scheduler_name)
        loaded = reload(temporary, pipeline, student, changed=changed, code=code, few_step=False, variant=format.variant)
        set_attributes(loaded, said)
        prove(student, loaded, "the exported pipeline", stock.plain, stock.calls, half=format.variant is not None)
        if not no_arguments:
            _add_few_step(student, temporary, loaded, stock.plain, said, format)
        note = words.seed_note(stock.generator_used, student.sampler.gamma, student.sampler.steps)
        load = words.load_stock(folder, pipeline, code=code, dtype=format.variant, call=note + words.call_code(student, arguments))
        also = None if "few_step" not in said else words.load_few_step(folder, pipeline, student, format.variant, named=False)
        (temporary / "README.md").write_text(_card(student, method, teacher_name, load, metrics, also), encoding="utf-8")


def export_few_step(
    student: Student, folder: Path, *, method: str, teacher_name: str, metrics: Sequence[dict[str, Any]] | None = None,
    overwrite: bool = False, format: Format = Format(),
) -> None:
    """Write the student as a folder whose pipeline class lies in it (pipelines/few_step.py on top of the teacher's class):
    any ladder of times, and a call that needs no arguments. It loads with ``trust_remote_code=True`` only, so that nobody
    samples it with the wrong scheduler.

    Raises:
        UserError: as for ``export_diffusers``.
    """
    check_shard_size(format.max_shard_size)
    with writing(folder, overwrite) as temporary:
        # The teacher's scheduler lies in the folder for its configuration, which pipelines read; the file replaces it.
        pipeline = assembly.with_others(student, assembly.assemble(student, assembly.merged(student), assembly.own_scheduler(student)))
        _save(pipeline, temporary, format)
        plain = plain_call(student, pipeline)
        said: dict[str, Any] = {"form": "few-step", "method": method, "teacher": teacher_name, "guidance_scale": call_guidance(student.sampler)}
        few_step.name_class(temporary)
        changed = (student.teacher.backbone_name, student.teacher.scheduler_name, *assembly.expert_names(student))
        every: dict[int, dict[str, Any]] = {n: {} for n in range(1, len(student.sampler.times) + 1)}

        def check(written: dict[str, Any]) -> None:
            write_facts(temporary, student.sampler, **said, few_step=written)
            loaded = reload(temporary, pipeline, student, changed=changed, code=True, few_step=False, variant=format.variant)
            prove(student, loaded, "the exported pipeline", plain, every, half=format.variant is not None)

        few_step.write_proven(student, temporary, type(pipeline), few_step.settings_of(student, plain), check)
        load = words.load_few_step(folder, pipeline, student, format.variant, named=True)
        (temporary / "README.md").write_text(_card(student, method, teacher_name, load, metrics, None), encoding="utf-8")


def _add_few_step(student: Student, folder: Path, stock: Any, plain: Plain, said: dict[str, Any], format: Format) -> None:
    """Lay the few-step pipeline file beside a stock export, and say so in distill.json; unless it does not sample as the student.

    Args:
        stock: the export, loaded.
    """
    every: dict[int, dict[str, Any]] = {n: {} for n in range(1, len(student.sampler.times) + 1)}

    def check(written: dict[str, Any]) -> None:
        prove(student, few_step.remade(folder, stock), "the few-step pipeline", plain, every, half=format.variant is not None)

    try:
        said["few_step"] = few_step.write_proven(student, folder, type(stock), few_step.settings_of(student, plain), check)
    except UserError as error:
        said["no_few_step"] = str(error)
        (folder / FEW_STEP_FILE).unlink(missing_ok=True)
    write_facts(folder, student.sampler, **said)


def check_forms(student: Student, forms: Sequence[str]) -> None:
    """Find out before training what cannot be exported after it.

    Raises:
        UserError: if no kohya names are known for the backbone, or for a layer that is trained.
    """
    if "lora-kohya" in forms and student.adapters is not None:
        kohya.modules(student.network.backbone, student.adapters.targets)


def load_export(folder: Path, **options: Any) -> Any:
    """An exported pipeline that samples right with nothing but a number of steps: the stock class where that suffices, else
    the few-step class. Options as for ``load_pipeline``.

    Raises:
        UserError: if it cannot be loaded.
    """
    facts = read_facts(folder) or {}
    variant = next((v for v in VARIANTS if any(folder.rglob(f"*.{v}*.safetensors"))), None)
    pipeline = load_pipeline(folder, variant=variant, few_step="few_step" in facts and any((facts.get("calls") or {}).values()), **options)
    set_attributes(pipeline, facts)
    return pipeline


def _save(pipeline: Any, folder: Path, format: Format) -> bool:
    """Weights, configurations and the code of classes that no library has; whether there was such code."""
    with quiet(), untied(pipeline):
        try:
            pipeline.save_pretrained(folder, safe_serialization=True, variant=format.variant, max_shard_size=format.max_shard_size)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{type(pipeline).__name__} cannot be saved: {str(error).splitlines()[0]}") from error
    if format.variant:
        to_variant(folder, format.variant)
    code = assembly.own_code(pipeline)
    if code:
        assembly.carry_own_code(folder, pipeline)
    return assembly.name_modules(folder, pipeline) or code


def _needs_no_arguments(pipeline: Any) -> bool:
    """Whether the class takes steps and guidance from its own configuration, as the toolkit's do."""
    return "num_inference_steps" in pipeline.config and "guidance_scale" in pipeline.config


def _card(student: Student, method: str, teacher_name: str, load: str, metrics: Sequence[dict[str, Any]] | None, also: str | None) -> str:
    text = student.teacher.input_name == "prompt"
    return model_card(
        title=f"{Path(teacher_name).name}, distilled", method=method, teacher_name=teacher_name, sampler=student.sampler,
        load=load, also=also, pipeline_tag="text-to-image" if text else "unconditional-image-generation", lora=False,
        license=license_of(find(teacher_name)), metrics=metrics, networks=words.networks(student),
    )
