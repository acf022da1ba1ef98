"""A student's adapter alone: in diffusers' names, in those of kohya and ComfyUI, or as a PEFT folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.export import assembly, few_step, kohya, words
from distill.export.adapter import Layer, adapted_layers, check_same
from distill.export.calls import Plain, call_guidance, plain_call
from distill.export.files import write_facts, writing
from distill.export.proof import absent, prove
from distill.export.schedulers import NoStockScheduler, Stock, choose
from distill.loading import FEW_STEP_FILE, quiet
from distill.modelcard import license_of, model_card
from distill.resources import find
from distill.running import is_cascade
from distill.student import Student

FILE = "pytorch_lora_weights.safetensors"
#: Backbones whose kohya names diffusers converts when it loads them.
CONVERTED = ("UNet2DConditionModel", "FluxTransformer2DModel")
Names = Literal["diffusers", "kohya"]


def export_lora(
    student: Student, folder: Path, *, method: str, teacher_name: str, metrics: Sequence[dict[str, Any]] | None = None,
    overwrite: bool = False, names: Names = "diffusers",
) -> None:
    """Write the student's adapter, to be loaded at scale 1, with the scheduler and the few-step pipeline file beside it.

    ``pytorch_lora_weights.safetensors`` for ``load_lora_weights`` where the teacher's pipeline has it, its strength
    alpha/rank folded into the weights, so that no loader can lose it; an ``adapter_model.safetensors`` for PEFT where it
    has not. In kohya's names alpha is a tensor beside each layer's weights.

    Raises:
        UserError: if the student has full weights, no kohya names are known for its backbone, or as for ``export_diffusers``.
    """
    if student.adapters is None:
        raise UserError("a student with full weights cannot be exported as a LoRA: use --to diffusers, or train with student.weights: lora")
    if student.sampler.end_time:
        raise UserError("a student that is told where its jumps end is no LoRA alone: use --to few-step")
    layers = adapted_layers(student)
    with writing(folder, overwrite) as temporary:
        backbone = assembly.bare(student)
        form = "kohya" if names == "kohya" else "diffusers" if _loader(student.teacher.pipeline, backbone) else "peft"
        _write_weights(student, temporary, form, layers)
        stock = _stock(student)
        pipeline = assembly.assemble(student, backbone, assembly.own_scheduler(student) if stock is None else stock.scheduler)
        plain = plain_call(student, pipeline) if stock is None else stock.plain
        said: dict[str, Any] = {"form": "lora", "names": form, "method": method, "teacher": teacher_name, "guidance_scale": call_guidance(student.sampler)}
        code = assembly.own_code(pipeline)
        if stock is not None:
            stock.scheduler.save_pretrained(temporary / "scheduler")
            said["calls"] = {str(n): extra for n, extra in stock.calls.items()}
        if stock is None or not code:
            said["few_step"] = few_step.write(temporary, type(pipeline), few_step.settings_of(student, plain))
            assembly.carry_pipeline(temporary, pipeline)
        write_facts(temporary, student.sampler, **said)
        load = _load_code(student, folder, teacher_name, form, stock, code)
        (temporary / "README.md").write_text(_card(student, method, teacher_name, load, metrics), encoding="utf-8")
        if stock is None:
            pipeline = few_step.remade(temporary, pipeline)
        _prove(student, temporary, pipeline, form, layers, plain, stock)


def _stock(student: Student) -> Stock | None:
    try:
        return choose(student, lambda scheduler: assembly.assemble(student, student.network.backbone, scheduler))
    except NoStockScheduler:
        return None


def _loader(pipeline: Any, backbone: nn.Module) -> bool:
    """Whether the pipeline can load a LoRA onto this backbone: by diffusers' own loader, or by one of the class's own."""
    own = getattr(type(pipeline), "load_lora_weights", None)
    return assembly.is_pixel_unet(pipeline) or (own is not None and hasattr(backbone, "load_lora_adapter"))


# -- weights ------------------------------------------------------------------------------------------------------------


def _write_weights(student: Student, folder: Path, form: str, layers: dict[str, Layer]) -> None:
    from safetensors.torch import save_file

    if form == "peft":
        _write_peft(student, folder, layers)
        return
    if form == "kohya":
        weights = kohya.weights(student.network.backbone, layers)
        first = next(iter(layers.values()))
        facts = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(first.rank), "ss_network_alpha": f"{first.alpha:g}"}
    else:
        weights, facts = diffusers_weights(student.teacher.backbone_name, layers), {"format": "pt"}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / FILE, metadata=facts)


def diffusers_weights(component: str, layers: dict[str, Layer]) -> dict[str, Tensor]:
    """In diffusers' names, alpha/rank folded into the second factor."""
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weights[f"{component}.{name}.lora_A.weight"] = layer.down
        weights[f"{component}.{name}.lora_B.weight"] = layer.up * layer.scale
        if layer.magnitude is not None:
            weights[f"{component}.{name}.lora_magnitude_vector"] = layer.magnitude
    return weights


def _write_peft(student: Student, folder: Path, layers: dict[str, Layer]) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    assert student.adapters is not None
    settings = student.adapters.settings
    alpha: Any = settings.alpha
    dora = any(layer.magnitude is not None for layer in layers.values())
    LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=sorted(layers), use_dora=dora, inference_mode=True).save_pretrained(str(folder))
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weights |= {f"base_model.model.{name}.lora_A.weight": layer.down, f"base_model.model.{name}.lora_B.weight": layer.up}
        if layer.magnitude is not None:
            weights[f"base_model.model.{name}.lora_magnitude_vector"] = layer.magnitude
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# -- proof --------------------------------------------------------------------------------------------------------------


def _prove(student: Student, folder: Path, pipeline: Any, form: str, layers: dict[str, Layer], plain: Plain, stock: Stock | None) -> None:
    """Load the file onto the bare teacher and compare images. For kohya's names the weights are read back as well, and the
    images compared only where diffusers can convert the names: ComfyUI reads more of them."""
    calls = {n: {} for n in range(1, len(student.sampler.times) + 1)} if stock is None else stock.calls
    name = student.teacher.backbone_name
    if form == "kohya":
        from safetensors.torch import load_file

        check_same(layers, kohya.deltas(student.network.backbone, load_file(folder / FILE)), student.network.backbone)
        dora = any(layer.magnitude is not None for layer in layers.values())
        if dora or type(student.network.backbone).__name__ not in CONVERTED:
            return  # diffusers drops kohya's dora_scale, and ignores the names of other backbones without a word
    if form == "peft":
        from peft import PeftModel

        setattr(pipeline, name, PeftModel.from_pretrained(getattr(pipeline, name), str(folder)).merge_and_unload().eval())
    else:
        try:
            with quiet():
                pipeline.load_lora_weights(str(folder))
        except Exception as error:  # a loader may refuse in any way
            if form == "kohya" and type(student.network.backbone).__name__ == "FluxTransformer2DModel":
                return  # diffusers knows the sizes of the published Flux models only
            raise UserError(f"the exported LoRA could not be loaded again ({str(error).splitlines()[0][:200]}): not written") from error
    with torch.no_grad():
        prove(student, pipeline, "the exported LoRA", plain, calls)


# -- words --------------------------------------------------------------------------------------------------------------


def _load_code(student: Student, folder: Path, teacher_name: str, form: str, stock: Stock | None, code: bool) -> str:
    path, name, sampler = folder.as_posix(), student.teacher.backbone_name, student.sampler
    few = "" if stock is not None or code else f', custom_pipeline="{path}"'
    trust = ", trust_remote_code=True)  # runs the pipeline's file, which lies there" if code or few else ")"
    lines = ["from diffusers import DiffusionPipeline" + (f", {type(stock.scheduler).__name__}" if stock else ""), "", ]
    if form == "peft":
        lines[1:1] = ["from peft import PeftModel"]
    none = "".join(f", {name}=None" for name in absent(student.teacher.pipeline))
    scheduler = "" if stock is None else f'{type(stock.scheduler).__name__}.from_pretrained("{path}", subfolder="scheduler")'
    stages = is_cascade(student.teacher.pipeline)  # pipelines of their own, made of these parts
    given = f", {student.teacher.scheduler_name}={scheduler}" if scheduler and stages else ""
    lines.append(f'pipe = DiffusionPipeline.from_pretrained("{teacher_name}"{none}{given}{few}{trust}')
    if stock is None and code:  # a teacher with a class of its own: diffusers loads no other on top of it
        lines[1:1] = ["from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module"]
        lines.append(f'pipe = get_class_from_dynamic_module("{path}", module_file="{FEW_STEP_FILE}", trust_remote_code=True).on(pipe)')
    if form == "peft":
        lines.append(f'pipe.{name} = PeftModel.from_pretrained(pipe.{name}, "{path}").merge_and_unload()')
    else:
        lines.append(f'pipe.load_lora_weights("{path}")')
    arguments: dict[str, Any] = {}
    if stock is not None:
        lines += words.attribute_lines(student.teacher.pipeline).splitlines()
        lines += [] if stages else [f"pipe.{student.teacher.scheduler_name} = {scheduler}"]
        arguments = {student.teacher.steps_name: sampler.steps, **stock.plain, **stock.calls[sampler.steps]}
        note = words.seed_note(stock.generator_used, sampler.gamma, sampler.steps)
        lines += [note.strip()] if note else []
    return "\n".join([*lines, words.call_code(student, arguments)]) + "\n"


def _card(student: Student, method: str, teacher_name: str, load: str, metrics: Sequence[dict[str, Any]] | None) -> str:
    text = student.teacher.input_name == "prompt"
    return model_card(
        title=f"{Path(teacher_name).name}, distilled", method=method, teacher_name=teacher_name, sampler=student.sampler,
        load=load, pipeline_tag="text-to-image" if text else "unconditional-image-generation", lora=True,
        license=license_of(find(teacher_name)), metrics=metrics,
    )
