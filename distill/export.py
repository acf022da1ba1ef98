"""A student as a diffusers folder or a LoRA that stock diffusers loads; proven by loading it and comparing the images.

The sampler travels as a stock ``LCMScheduler`` whose configuration visits the trained timesteps exactly. Everything is
written into a folder beside the target and renamed at the end: a failed export leaves nothing behind.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import __version__
from distill.errors import UserError
from distill.evaluate.generate import conditioned_on
from distill.loading import SHIPPED_PIPELINES, quiet, shipped_pipeline
from distill.modelcard import license_of, model_card
from distill.resources import find, resource
from distill.sampling import Sampler
from distill.student import Student

FACTS = "distill.json"
TOLERANCE = 1e-4  #: largest difference of images in [0, 1] between the exported student and ours, in float32


def export_diffusers(
    student: Student, folder: Path, *, method: str, teacher_name: str, metrics: Sequence[dict[str, Any]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the student as a pipeline folder; a LoRA student is merged into a copy of its backbone.

    Raises:
        UserError: if no stock scheduler reproduces the sampler, the folder cannot be written, or it holds something that
            is not an export (or is one, and ``overwrite`` is not set).
    """
    with _writing(folder, overwrite) as temporary:
        pipeline = _assemble(student, _merged(student))
        with quiet():
            pipeline.save_pretrained(temporary, safe_serialization=True)
        own_code = type(pipeline).__name__ in SHIPPED_PIPELINES
        if own_code:
            carry_code(temporary, type(pipeline).__name__)
        _write_facts(temporary, student, method, teacher_name, "diffusers")
        load = _load_code(student, folder, own_code)
        (temporary / "README.md").write_text(_card(student, method, teacher_name, load, False, metrics), encoding="utf-8")
        _prove(student, _reload(temporary, pipeline, student, own_code), "the exported pipeline")


def export_lora(
    student: Student, folder: Path, *, method: str, teacher_name: str, metrics: Sequence[dict[str, Any]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the student's adapter as ``pytorch_lora_weights.safetensors``, to be loaded with ``load_lora_weights`` at
    scale 1, and the scheduler beside it. The adapter's strength alpha/rank is folded into the weights, so that no
    loader can lose it.

    Raises:
        UserError: if the student has full weights, or as for ``export_diffusers``.
    """
    if student.adapters is None:
        raise UserError("a student with full weights cannot be exported as a LoRA: use --to diffusers, or train with student.weights: lora")
    from safetensors.torch import save_file

    scale = student.adapters.settings.alpha / student.adapters.settings.rank
    weights = {
        f"unet.{name}" if student.teacher.backbone_name == "unet" else f"{student.teacher.backbone_name}.{name}":
        (p.detach() * (scale if "lora_B" in name else 1.0)).contiguous().cpu()
        for name, p in student.denoiser.named_parameters().items()
    }
    with _writing(folder, overwrite) as temporary:
        save_file(weights, temporary / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
        _scheduler(student).save_pretrained(temporary / "scheduler")
        _write_facts(temporary, student, method, teacher_name, "lora")
        load = _lora_code(student, folder, teacher_name)
        (temporary / "README.md").write_text(_card(student, method, teacher_name, load, True, metrics), encoding="utf-8")
        pipeline = _assemble(student, _bare(student))
        pipeline.load_lora_weights(str(temporary))
        _prove(student, pipeline, "the exported LoRA")


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself (distill.json), with its ``Sampler`` under "sampler"; None for any other folder.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["sampler"] = Sampler.from_json(facts["sampler"])
        return dict(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): export the student again") from None


# -- the pieces ---------------------------------------------------------------------------------------------------------


def _scheduler(student: Student) -> Any:
    """An ``LCMScheduler`` that visits the sampler's times for every number of steps, on the teacher's schedule."""
    from diffusers import LCMScheduler

    sampler, schedule, teacher = student.sampler, student.denoiser.schedule, student.teacher.pipeline.scheduler
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr")
    config = {k: teacher.config[k] for k in keys if teacher.config.get(k) is not None}
    scheduler = LCMScheduler(**config, original_inference_steps=len(sampler.times), clip_sample=False, set_alpha_to_one=True)
    if not torch.allclose(scheduler.alphas_cumprod, teacher.alphas_cumprod, atol=1e-6):
        raise UserError(f"the noise schedule of {type(teacher).__name__} cannot be written as a stock LCMScheduler")
    for steps in range(1, len(sampler.times) + 1):
        scheduler.set_timesteps(steps)
        wanted = schedule.model_time(torch.tensor(sampler.ladder(steps), dtype=torch.float64))
        if not torch.allclose(scheduler.timesteps.double(), wanted, atol=1e-6):
            raise UserError(
                f"no stock scheduler visits this student's times {', '.join(f'{t:g}' for t in sampler.times)}: "
                "only evenly spaced ladders from t = 1 can be exported (leave out method.times)"
            )
    return LCMScheduler.from_config(scheduler.config)  # a fresh one, with no timesteps set


def _assemble(student: Student, backbone: nn.Module) -> Any:
    """The teacher's pipeline around another backbone, with the few-step scheduler; nothing else is copied."""
    import inspect

    pipeline = student.teacher.pipeline
    scheduler = _scheduler(student)
    if getattr(pipeline, "vae", None) is None:
        null = pipeline.config.get("null_class")
        made = shipped_pipeline("UNet2DPipeline")(backbone, scheduler, num_inference_steps=student.sampler.steps, guidance_scale=1.0, null_class=null)
    else:
        arguments = {**pipeline.components, student.teacher.backbone_name: backbone, "scheduler": scheduler}
        for name in inspect.signature(type(pipeline).__init__).parameters:
            if name not in arguments and name in pipeline.config:
                arguments[name] = pipeline.config[name]
        made = type(pipeline)(**arguments)
    made.set_progress_bar_config(disable=True)
    return made


def _merged(student: Student) -> nn.Module:
    """The backbone with the student's adapter merged, on a copy; the backbone itself for full weights."""
    return student.denoiser.backbone if student.adapters is None else _without_adapters(student, merge=True)


def _bare(student: Student) -> nn.Module:
    """A copy of a LoRA student's backbone with all adapters taken off: the teacher's."""
    return _without_adapters(student, merge=False)


def _without_adapters(student: Student, merge: bool) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer

    backbone = copy.deepcopy(student.denoiser.backbone)
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if merge:
                layer.merge(safe_merge=False, adapter_names=["student"])
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, layer.get_base_layer())
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    return backbone.requires_grad_(False)


def carry_code(folder: Path, class_name: str) -> None:
    """Copy the pipeline's file into the folder and name it in model_index.json, as diffusers expects."""
    stem = SHIPPED_PIPELINES[class_name]
    shutil.copyfile(resource(f"pipelines/{stem}.py"), folder / f"{stem}.py")
    index = folder / "model_index.json"
    facts = json.loads(index.read_text())
    facts["_class_name"] = [stem, class_name]
    index.write_text(json.dumps(facts, indent=2) + "\n")


def _write_facts(folder: Path, student: Student, method: str, teacher_name: str, form: str) -> None:
    facts = {
        "form": form, "method": method, "teacher": teacher_name, "sampler": asdict(student.sampler),
        "guidance_scale": call_guidance(student.sampler), "distill": __version__,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def call_guidance(sampler: Sampler) -> float:
    """The ``guidance_scale`` to call the exported pipeline with: 1 where it is folded in, else the middle of the range."""
    return 1.0 if sampler.guidance_range is None else sum(sampler.guidance_range) / 2


# -- proof --------------------------------------------------------------------------------------------------------------


def _reload(folder: Path, written: Any, student: Student, own_code: bool) -> Any:
    """What was written, loaded by diffusers; parts that the export did not change are not loaded twice."""
    import diffusers

    changed = (student.teacher.backbone_name, "scheduler")
    kept = {k: v for k, v in written.components.items() if k not in changed and isinstance(v, nn.Module)}
    extra: dict[str, Any] = {"trust_remote_code": True} if own_code else {}  # our own file, copied there a moment ago
    with quiet():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=student.denoiser.dtype, use_safetensors=True, **kept, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(student.teacher.device)


@torch.no_grad()
def _prove(student: Student, pipeline: Any, what: str) -> None:
    """Compare images of equal seeds for every number of steps.

    Raises:
        UserError: if they differ by more than ``TOLERANCE`` (in half precision: 0.1).
    """
    teacher, guidance = student.teacher, call_guidance(student.sampler)
    inputs = [teacher.placeholder()] * 2
    kind = conditioned_on(pipeline)
    limit = TOLERANCE if student.denoiser.dtype == torch.float32 else 0.1
    for steps in range(1, len(student.sampler.times) + 1):
        ours = student.images(inputs, steps=steps, generator=torch.Generator().manual_seed(0), guidance_scale=guidance).cpu()
        call: dict[str, Any] = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        call |= {"batch_size": len(inputs)} if kind is None else {kind: inputs}
        images = torch.from_numpy(pipeline(**call, guidance_scale=guidance).images).permute(0, 3, 1, 2)
        difference = float((images - ours).abs().max())
        if not difference <= limit:
            raise UserError(f"{what} differs from the student by {difference:.1e} in {steps} steps (allowed {limit:.0e}): not written")


# -- words --------------------------------------------------------------------------------------------------------------


def _card(student: Student, method: str, teacher_name: str, load: str, lora: bool, metrics: Sequence[dict[str, Any]] | None) -> str:
    text = student.teacher.input_name == "prompt"
    return model_card(
        title=f"{Path(teacher_name).name}, distilled", method=method, teacher_name=teacher_name, sampler=student.sampler,
        load=load, pipeline_tag="text-to-image" if text else "unconditional-image-generation", lora=lora,
        license=license_of(find(teacher_name)), metrics=metrics,
    )


def _call_code(student: Student) -> str:
    steps, guidance = student.sampler.steps, call_guidance(student.sampler)
    if student.teacher.input_name == "prompt":
        return f'image = pipe("a photograph of a cat", num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]'
    return "image = pipe(class_labels=[3]).images[0]" if student.teacher.input_name else "image = pipe(batch_size=1).images[0]"


def _load_code(student: Student, folder: Path, own_code: bool) -> str:
    trust = ", trust_remote_code=True)  # runs unet2d.py, which lies in the folder" if own_code else ")"
    return f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{folder.as_posix()}"{trust}\n{_call_code(student)}\n'


def _lora_code(student: Student, folder: Path, teacher_name: str) -> str:
    if student.teacher.input_name == "prompt" or getattr(student.teacher.pipeline, "vae", None) is not None:
        base = f'pipe = DiffusionPipeline.from_pretrained("{teacher_name}")'
    else:
        base = f'pipe = DiffusionPipeline.from_pretrained("{teacher_name}", trust_remote_code=True)  # runs unet2d.py, which lies there'
    call = _call_code(student)
    if student.teacher.input_name != "prompt":
        call = call.replace(").images", f", num_inference_steps={student.sampler.steps}).images")
    return (
        "from diffusers import DiffusionPipeline, LCMScheduler\n\n" + base + f'\npipe.load_lora_weights("{folder.as_posix()}")\n'
        f'pipe.scheduler = LCMScheduler.from_pretrained("{folder.as_posix()}", subfolder="scheduler")\n{call}\n'
    )


# -- files --------------------------------------------------------------------------------------------------------------


@contextmanager
def _writing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` if the block ends well, and vanishes if not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / FACTS).is_file():
            raise UserError(f"{folder} exists and is not an export of this tool: choose another folder")
        if not overwrite:
            raise UserError(f"{folder} exists already: choose another folder with --out, or remove it")
    temporary, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
