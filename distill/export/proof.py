"""The proof of an export: what was written is loaded as a user would load it, and makes the student's images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.export.calls import Plain, call_arguments, call_guidance, probe_inputs
from distill.export.rehearsal import Trace, distance, resumed, seeded, unit_noise, watching
from distill.latents import as_images
from distill.loading import FEW_STEP_FILE, quiet, read_model_index
from distill.student import Student

TOLERANCE = 1e-4  #: largest difference of images in [0, 1] between the exported student and ours, in float32
ROUNDING = 1e-6  #: of float32 samples that differ by the order of the arithmetic alone, over their largest value
HALF_TOLERANCE = 0.1  #: the same where weights or arithmetic are in half precision


def reload(folder: Path, written: Any, student: Student, *, changed: tuple[str, ...], code: bool, few_step: bool, variant: str | None = None) -> Any:
    """What was written, loaded by diffusers; parts that the export did not change are not loaded twice.

    Args:
        code: whether files of the folder have to be run: ours, copied there a moment ago, or the teacher's own.
        few_step: load the few-step pipeline in place of the one that model_index.json names.
    """
    import diffusers

    index = read_model_index(folder)
    own = {k for k in written.components if (folder / k / f"{index[k][0]}.py").is_file()}  # diffusers loads these by itself only
    kept: dict[str, Any] = {k: v for k, v in written.components.items() if k not in (*changed, *own) and isinstance(v, nn.Module)}
    kept |= {name: None for name in absent(written)}
    extra: dict[str, Any] = {"trust_remote_code": True} if code or few_step else {}
    extra |= {"custom_pipeline": Path(FEW_STEP_FILE).stem} if few_step else {}
    extra |= {"variant": variant} if variant else {}
    try:
        with quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=student.denoiser.dtype, use_safetensors=True, **kept, **extra)
    except Exception as error:  # every loader error: one line
        raise UserError(f"the export could not be loaded again ({str(error).splitlines()[0][:200]}): not written") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(student.teacher.device)


@torch.no_grad()
def prove(student: Student, pipeline: Any, what: str, plain: Plain, calls: Mapping[int, dict[str, Any]], half: bool = False) -> None:
    """Compare images from equal noise for every number of steps, and of the call with no settings for a few-step pipeline.

    Args:
        calls: by number of steps, the further arguments of the call.

    Raises:
        UserError: if they differ by more than ``TOLERANCE`` (in half precision: ``HALF_TOLERANCE``).
    """
    inputs, steps_of_call = probe_inputs(student), student.sampler.steps
    condition = student.teacher.condition(inputs)
    limit = HALF_TOLERANCE if half or student.denoiser.dtype != torch.float32 else TOLERANCE
    attempts = [(n, call_arguments(student, pipeline, inputs, n, plain) | calls[n]) for n in range(1, len(student.sampler.times) + 1)]
    if hasattr(pipeline, "settings"):
        bare = {k: v for k, v in attempts[steps_of_call - 1][1].items() if k not in (student.teacher.steps_name, *pipeline.settings["call"])}
        attempts.append((steps_of_call, bare))
    for steps, arguments in attempts:
        trace = Trace()
        try:
            with seeded() as generator, watching(getattr(pipeline, student.teacher.scheduler_name), steps, trace, made_up=False), quiet():
                images = as_images(pipeline(**arguments, generator=generator))
        except Exception as error:  # whatever a pipeline may raise
            raise UserError(f"{what} cannot be called: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}: not written") from error
        if trace.noise is None:
            raise UserError(f"{what} never used its scheduler: not written")
        with resumed(trace) as fresh:
            noise = unit_noise(student.teacher.walk, getattr(pipeline, student.teacher.scheduler_name), trace.noise)
            noise = noise.reshape(-1, *student.teacher.sample_shape)  # some schedulers have a row per frame
            x0 = student.sample_from(condition, noise, steps, fresh, call_guidance(student.sampler))
        difference = _difference(student, images, x0, trace)
        if not difference <= limit:
            raise UserError(f"{what} differs from the student by {difference:.1e} in {steps} steps (allowed {limit:.0e}): not written")


def _difference(student: Student, images: Tensor | None, x0: Tensor, trace: Trace) -> float:
    """The largest difference of the images; of the samples that the images are made of, where the pipeline makes
    something else of them than one image per sample (depth maps, several sizes), or rounds them to 8 bits (for a safety checker).

    Some decoders jump: those with a codebook take the entry nearest to each value, and rounding may choose another one. So
    where the samples are equal but for rounding, the pipeline's images are compared with those of its own samples.
    """
    assert trace.final is not None
    samples = distance(x0 * student.denoiser.schedule.data_scale, trace.final.reshape(x0.shape))
    if images is None:
        return samples
    difference = _of_images(student, images, x0)
    if difference is None:
        return samples
    if difference > TOLERANCE and samples <= ROUNDING:
        return _of_images(student, images, trace.final.reshape(x0.shape) / student.denoiser.schedule.data_scale) or 0.0
    return difference


def _of_images(student: Student, images: Tensor, x0: Tensor) -> float | None:
    """The largest difference of images from those of a sample; None if they are not of one size, or rounded to 8 bits."""
    ours = student.teacher.decode(x0).cpu().float()
    ours = ours.movedim(2, 1).flatten(0, 1) if ours.dim() == 5 else ours  # frames in the batch, as the pipeline's
    if images.numel() != ours.numel():
        return None
    difference = float((images - ours.reshape(images.shape)).abs().max())
    return None if _whole(images * 255) and difference <= 1 / 255 + TOLERANCE else difference


def _whole(x: Tensor) -> bool:
    return bool(((x - x.round()).abs() < 1e-3).all())


def absent(pipeline: Any) -> list[str]:
    """Components that the pipeline has none of, and that diffusers wants to be told so (``text_encoder_3=None``)."""
    return [name for name, part in pipeline.components.items() if part is None and name not in type(pipeline)._optional_components]
