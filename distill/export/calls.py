"""How the exported pipeline is called: the arguments beside prompt and number of steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from distill.experts import ByCondition, Routed
from distill.sampling import Sampler
from distill.student import Student

#: Arguments of every call of an exported pipeline, whatever the number of steps: guidance off or as trained, the size.
Plain = Mapping[str, Any]


def call_guidance(sampler: Sampler) -> float:
    """The ``guidance_scale`` to call the exported pipeline with: 1 where it is folded in, else the middle of the range."""
    return 1.0 if sampler.guidance_range is None else sum(sampler.guidance_range) / 2


def takes(pipeline: Any, *names: str) -> bool:
    """Whether the pipeline's call has all of these arguments."""
    return set(names) <= inspect.signature(pipeline.__call__).parameters.keys()


def guidance_off(student: Student, pipeline: Any) -> dict[str, float]:
    """The arguments that switch guidance off, as the teacher found them: it is folded into the student."""
    return {k: float(v) for k, v in student.teacher.settings["off"].items() if takes(pipeline, k)}


def plain_call(student: Student, pipeline: Any) -> dict[str, Any]:
    """The teacher's own fixed arguments, and guidance as the student was trained for it."""
    plain = fixed_arguments(student) | guidance_off(student, pipeline)
    if student.sampler.guidance_range is not None:
        plain["guidance_scale"] = call_guidance(student.sampler)
    foreign = {k for k in plain if takes(student.teacher.pipeline, k) and not takes(pipeline, k)}  # a student's class may be another
    return {k: v for k, v in plain.items() if k not in (student.teacher.steps_name, "generator", "output_type", *foreign)}


def fixed_arguments(student: Student) -> dict[str, Any]:
    """The arguments that every call of the teacher gets (a size, an image to start from)."""
    left_out = ("off", "negative_prompt", student.teacher.input_name)
    return {k: v for k, v in student.teacher.settings.items() if k not in left_out}


def probe_inputs(student: Student) -> list[Any]:
    """Inputs for a trial run: two (or one of each part of the conditions that has a network of its own), so that a batch is
    tried, where the pipeline takes several at once (and the teacher's fixed arguments are no tensors or images for one sample)."""
    teacher = student.teacher
    several = teacher.batched and all(isinstance(v, (bool, int, float, str, type(None))) for v in fixed_arguments(student).values())
    several = several and takes(teacher.pipeline, teacher.input_name or "batch_size")
    route = student.denoiser.route if isinstance(student.denoiser, Routed) else None
    inputs = (route.examples if isinstance(route, ByCondition) else None) or [teacher.placeholder()] * 2  # each network is tried
    return list(inputs) if several else inputs[-1:]


def call_arguments(student: Student, pipeline: Any, inputs: Sequence[Any], steps: int, plain: Plain) -> dict[str, Any]:
    """All arguments for so many steps, but the generator; images come back as an array."""
    name = student.teacher.input_name
    what: dict[str, Any] = {}
    if name is not None:
        what[name] = inputs[0] if name == "prompt" and len(inputs) == 1 else list(inputs)  # some take one prompt only
    elif takes(pipeline, "batch_size"):
        what["batch_size"] = len(inputs)
    settings = {student.teacher.steps_name: steps, "output_type": "np"}
    return {**plain, **what, **{k: v for k, v in settings.items() if takes(pipeline, k)}}
