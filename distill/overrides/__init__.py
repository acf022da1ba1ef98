"""What recording cannot settle, one short entry per pipeline class. No network code.

A user's own: ``teacher.override: package.module:OVERRIDE`` in a recipe, or ``Teacher(pipeline, override=Override(...))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.errors import UserError
from distill.imports import import_object


@dataclass(frozen=True)
class Override:
    """What is known of a pipeline beforehand. Everything left out is inferred."""

    network: str | None = None  #: the component that denoises
    state: str | None = None  #: its argument that takes x_t
    guidance: str | None = None  #: the argument of the pipeline's call that sets classifier-free guidance
    guidance_off: float | None = None  #: its value that switches guidance off
    steps: str | None = None  #: the argument of the pipeline's call that sets the number of steps
    constants: Mapping[str, Any] = field(default_factory=dict)  #: arguments of the network's call that are to be the same at every step
    call: Mapping[str, Any] = field(default_factory=dict)  #: further arguments of the pipeline's call
    student: str | None = None  #: the class of diffusers in which students go home, where the teacher's own cannot sample them
    why: str = ""  #: what could not be inferred


_CACHED = "the first step fills a cache of the text's keys and values, which the others read: every call computes them here"
_ENLARGED = "its last stage is a super-resolution with two networks: what is distilled is the decoder"
OVERRIDES: dict[str, Override] = {
    "Ideogram4Pipeline": Override(
        network="transformer", guidance="guidance_scale", guidance_off=1.0, why="a second network guides it: what is distilled is the first one, unguided",
    ),
    "QwenImage21Pipeline": Override(constants={"kv_cache": None, "kv_cache_mode": None}, why=_CACHED),
    "StableDiffusionAttendAndExcitePipeline": Override(
        call={"max_iter_to_alter": 0, "thresholds": {}}, why="it alters the sample by gradients of its own between the steps; a student makes plain steps",
    ),
    "StableDiffusionParadigmsPipeline": Override(
        call={"parallel": 1}, student="StableDiffusionPipeline", why="it takes many steps at once, which a student of few does not need",
    ),
    "UnCLIPPipeline": Override(network="decoder", steps="decoder_num_inference_steps", why=_ENLARGED),
    "UnCLIPImageVariationPipeline": Override(network="decoder", steps="decoder_num_inference_steps", why=_ENLARGED),
}


def find_override(spec: str | None, pipeline_class: str) -> Override:
    """The user's override, given by import path ``module:NAME``; else the toolkit's for the class; else an empty one.

    Raises:
        UserError: if the path leads to no Override.
    """
    if spec is None:
        return OVERRIDES.get(pipeline_class, Override())
    try:
        found = import_object(spec)
    except ValueError as error:
        raise UserError(f"teacher.override: {spec} cannot be imported ({error}): give module:NAME") from None
    if not isinstance(found, Override):
        raise UserError(f"teacher.override: {spec} is a {type(found).__name__}, not a distill.overrides.Override")
    return found
