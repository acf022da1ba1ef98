"""How the exported pipeline is called: the arguments beside prompt and number of steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

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


def plain_call(student: Student, pipeline: Any) -> dict[str, Any]:
    """The teacher's own fixed arguments, and guidance as the student was trained for it: off, since it is folded in."""
    plain = dict(getattr(student.teacher, "call", None) or {})
    guidance = {"guidance_scale": call_guidance(student.sampler), "true_cfg_scale": 1.0}
    plain |= {name: value for name, value in guidance.items() if takes(pipeline, name) and (name not in plain or name == "guidance_scale")}
    return {k: v for k, v in plain.items() if k not in ("num_inference_steps", "generator", "output_type")}


def call_arguments(student: Student, pipeline: Any, inputs: Sequence[Any], steps: int, plain: Plain) -> dict[str, Any]:
    """All arguments for so many steps, but the generator; images come back as an array."""
    name = student.teacher.input_name
    what: dict[str, Any] = {name: list(inputs)} if name else {"batch_size": len(inputs)} if takes(pipeline, "batch_size") else {}
    return {**plain, **what, "num_inference_steps": steps, "output_type": "np"}
