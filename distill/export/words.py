"""The code lines of a model card: how to load the student and call it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.experts import ByTime, Routed
from distill.export.assembly import attributes, is_plain
from distill.export.calls import fixed_arguments
from distill.export.proof import absent
from distill.student import Student


def call_code(student: Student, arguments: Mapping[str, Any]) -> str:
    """``image = pipe(...)`` with the given arguments."""
    name = student.teacher.input_name
    first = {"prompt": '"a photograph of a cat"', "class_labels": "class_labels=[3]", None: "batch_size=1"}.get(name, f"{name}=…")
    shown = "".join(f", {k}={_shown(v)}" for k, v in arguments.items())
    return f"image = pipe({first}{shown}).images[0]"


def _shown(value: Any) -> str:
    """A value as source; images, tensors and the like are left to the reader."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return repr(value) if isinstance(value, (bool, int, str, type(None))) else "…"


def networks(student: Student) -> str | None:
    """For the model card: which of several networks answers; None for one."""
    if not isinstance(student.denoiser, Routed):
        return None
    names, route = student.denoiser.component_names(student.teacher.backbone_name), student.denoiser.route
    if isinstance(route, ByTime):
        return "; ".join(f"`{name}` from t = {start:g}" for name, start in zip(names, route.starts, strict=True)) + " on"
    if student.teacher.input_name != "class_labels":
        return f"{', '.join(f'`{name}`' for name in names)}, each for a part of all prompts"
    classes = [*route.examples, student.teacher.classes or route.examples[-1] + 1]
    return "; ".join(f"`{name}` for the classes {classes[k]} to {classes[k + 1] - 1}" for k, name in enumerate(names))


def seed_note(generator_used: bool, gamma: float, steps: int) -> str:
    """A warning for pipelines whose sampling noise does not come from the call's generator."""
    if generator_used or gamma == 0 or steps == 1:
        return ""
    return "# this class draws the noise of later steps from PyTorch's global generator: torch.manual_seed(0) for equal images\n"


def attribute_lines(pipeline: Any) -> str:
    """Lines that set what somebody has set on the teacher's pipeline, and diffusers does not save."""
    return "".join(f"pipe.{name} = {value!r}\n" for name, value in attributes(pipeline).items())


def load_stock(folder: Path, pipeline: Any, *, code: bool, dtype: str | None, call: str) -> str:
    """Code that loads the stock pipeline."""
    extra = "".join(f", {name}=None" for name in absent(pipeline))
    extra += f', variant="{dtype}", torch_dtype=torch.{_torch_name(dtype)}' if dtype else ""
    extra += ", trust_remote_code=True)  # runs the pipeline's file, which lies in the folder" if code else ")"
    start = "import torch\n" if dtype else ""
    load = f'pipe = DiffusionPipeline.from_pretrained("{folder.as_posix()}"{extra}'
    return f"{start}from diffusers import DiffusionPipeline\n\n{load}\n{attribute_lines(pipeline)}{call}\n"


def load_few_step(folder: Path, pipeline: Any, student: Student, dtype: str | None, named: bool) -> str:
    """Code that loads the few-step pipeline file.

    Args:
        named: whether model_index.json names the file's class, so that it need not be asked for.
    """
    variant = "".join(f", {name}=None" for name in absent(pipeline))
    variant += f', variant="{dtype}", torch_dtype=torch.{_torch_name(dtype)}' if dtype else ""
    path = folder.as_posix()
    rest = {k: v for k, v in fixed_arguments(student).items() if not is_plain(v)}  # images and the like, which no file holds
    custom = "" if named else ', custom_pipeline="pipeline"'
    return (
        ("import torch\n" if dtype else "") + "from diffusers import DiffusionPipeline\n\n# pipeline.py lies in the folder and is run: read it first\n"
        f'pipe = DiffusionPipeline.from_pretrained("{path}"{custom}{variant}, trust_remote_code=True)\n{call_code(student, rest)}\n'
    )


def _torch_name(variant: str) -> str:
    return {"fp16": "float16", "bf16": "bfloat16"}[variant]
