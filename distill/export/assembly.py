"""The student's pipeline: the teacher's, around another backbone and scheduler; and the code that such a pipeline needs."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distill.errors import UserError
from distill.experts import Routed
from distill.export.calls import call_guidance
from distill.loading import SHIPPED_PIPELINES, quiet, shipped_pipeline
from distill.resources import resource
from distill.roles import adapter_name
from distill.student import Student
from distill.two_time import NAME as END_TIME


def assemble(student: Student, backbone: nn.Module, scheduler: Any) -> Any:
    """The teacher's pipeline around another backbone and scheduler; everything else is shared, nothing is copied.

    A bare ``UNet2DModel`` gets the toolkit's own pixel-space pipeline: the stock ones (``DDIMPipeline``) force a scheduler
    of theirs.
    """
    pipeline = student.teacher.pipeline
    if is_pixel_unet(pipeline):
        null = pipeline.config.get("null_class")
        made = shipped_pipeline("UNet2DPipeline")(backbone, scheduler, num_inference_steps=student.sampler.steps, guidance_scale=1.0, null_class=null)
    else:
        guiding, backbone_name, scheduler_name = _guiders_off(student), student.teacher.backbone_name, student.teacher.scheduler_name
        made = remake(_class_of(student), pipeline, {**pipeline.components, **guiding, backbone_name: backbone, scheduler_name: scheduler})
    made.set_progress_bar_config(disable=True)
    return made


def with_others(student: Student, pipeline: Any) -> Any:
    """The pipeline with the student's further networks as components, in a class of the same name: what is saved."""
    others = {name: merged(student, k) for k, name in enumerate(expert_names(student)) if k}
    others |= {} if (embedding := student.networks[0].end_time) is None else {END_TIME: embedding}
    if not others:
        return pipeline
    cls = type(pipeline)
    stock = inspect.signature(cls.__init__)
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in others]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in others}
        cls.__init__(self, *args, **kwargs)
        self.register_modules(**own)

    given = list(stock.parameters.values())
    last = len(given) - (given[-1].kind is inspect.Parameter.VAR_KEYWORD)
    init.__signature__ = stock.replace(parameters=[*given[:last], *ours, *given[last:]])  # type: ignore[attr-defined]
    several = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(__init__=init, __module__=cls.__module__))
    made = remake(several, pipeline, {**pipeline.components, **others})
    made.set_progress_bar_config(disable=True)
    return made


def expert_names(student: Student) -> list[str]:
    """Of the backbones, if there are several."""
    return student.denoiser.component_names(student.teacher.backbone_name) if isinstance(student.denoiser, Routed) else []


def own_scheduler(student: Student) -> Any:
    """The teacher's own scheduler: in a cascade, that of the stage that is distilled."""
    return student.teacher.pipeline.components[student.teacher.scheduler_name]


def _class_of(student: Student) -> type[Any]:
    """The pipeline's class, or that of diffusers which its override names for students."""
    import diffusers

    name = student.teacher.override.student
    return type(student.teacher.pipeline) if name is None else getattr(diffusers, name)


def _guiders_off(student: Student) -> dict[str, Any]:
    """The components that guide, with their guidance off or as the student was trained for it."""
    scales = {path.partition("."): off for path, off in student.teacher.settings["off"].items() if "." in path}
    trained = student.sampler.guidance_range is not None
    wanted = {name: {attribute: call_guidance(student.sampler) if trained else off} for (name, _, attribute), off in scales.items()}
    return {name: student.teacher.pipeline.components[name].new(**setting) for name, setting in wanted.items()}


def is_pixel_unet(pipeline: Any) -> bool:
    """Whether it is a bare ``UNet2DModel`` in a class of diffusers' or the toolkit's own (a user's class is kept)."""
    from diffusers import UNet2DModel

    known = type(pipeline).__name__ in SHIPPED_PIPELINES or not foreign(type(pipeline))
    return known and set(pipeline.components) <= {"unet", "scheduler"} and type(pipeline.components.get("unet")) is UNet2DModel


def remake(cls: type[Any], pipeline: Any, parts: Mapping[str, Any]) -> Any:
    """A pipeline of the class from the given parts and another pipeline's configuration."""
    parameters = inspect.signature(cls.__init__).parameters
    arguments = {k: v for k, v in parts.items() if k in parameters}
    arguments |= {k: pipeline.config[k] for k in parameters if k not in arguments and k in pipeline.config}
    with quiet():
        made = cls(**arguments)
    for name, value in attributes(pipeline).items():
        setattr(made, name, value)
    return made


def attributes(pipeline: Any) -> dict[str, Any]:
    """Plain values that somebody has set on a pipeline after its construction (``pipe.tokenizer_max_length = 77``): diffusers
    saves none of them, so they travel with the export. What its own constructor sets again is left out."""
    parameters = inspect.signature(type(pipeline).__init__).parameters
    known = {**pipeline.config, **pipeline.components}
    with quiet():
        fresh = vars(type(pipeline)(**{k: known[k] for k in parameters if k in known}))
    mine = {k: v for k, v in vars(pipeline).items() if not k.startswith("_") and k in fresh and is_plain(v)}
    return {k: v for k, v in mine.items() if type(v) is not type(fresh[k]) or v != fresh[k]}


def is_plain(value: Any) -> bool:
    """Whether a value can be written down as it is: None, a number, text, or lists of these."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def merged(student: Student, k: int = 0) -> nn.Module:
    """The backbone (network k of several) as it is handed back: with the student's adapter merged, on a copy; full weights in the teacher's dtype, the
    backbone itself where it has no other."""
    if student.adapters is not None:
        return _without_adapters(student, adapter_name("student", k))
    network = student.networks[k]
    return network.backbone if network.masters is None else network.masters.narrow_copy(network.backbone)


def bare(student: Student) -> nn.Module:
    """A copy of a LoRA student's backbone with all adapters taken off: the teacher's."""
    return _without_adapters(student, None)


def _without_adapters(student: Student, merge: str | None) -> nn.Module:
    """A copy; ``merge``: the adapter that becomes part of its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    backbone = copy.deepcopy(student.networks[0].backbone)
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if merge is not None:
                layer.merge(safe_merge=False, adapter_names=[merge])
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, layer.get_base_layer())
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    return backbone.requires_grad_(False)


# -- code that travels --------------------------------------------------------------------------------------------------


def own_code(pipeline: Any) -> bool:
    """Whether the pipeline's class, or that of one of its parts, is not one of the libraries'."""
    return bool(foreign(type(pipeline)) or any(foreign(type(part)) for part in pipeline.components.values()))


def foreign(cls: type) -> bool:
    """Whether no library that diffusers loads from has the class."""
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    return cls.__module__.split(".")[0] not in {*LOADABLE_CLASSES, "builtins"}


def carry_own_code(folder: Path, pipeline: Any) -> None:
    """Copy the files of the classes that no library has, and name them in model_index.json, as diffusers expects.

    Raises:
        UserError: if a class has no file of its own.
    """
    stem = carry_pipeline(folder, pipeline)
    if stem:
        edit_index(folder, {"_class_name": [stem, type(pipeline).__name__]})
    for part_name, part in pipeline.components.items():
        if foreign(type(part)):
            source = _source(type(part))
            stem = _own_name(source.stem)
            shutil.copyfile(source, folder / part_name / f"{stem}.py")
            edit_index(folder, {part_name: [stem, type(part).__name__]})


def _own_name(stem: str) -> str:
    """A file name that diffusers does not take for one of its own modules: it looks there first."""
    from diffusers import pipelines

    return f"own_{stem}" if hasattr(pipelines, stem) else stem


def name_modules(folder: Path, pipeline: Any) -> bool:
    """Say in model_index.json where the classes are that diffusers saves but does not find again (those of its deprecated
    pipelines): by their module, which importing the pipeline imports; else by a file of one line in the part's folder.

    Returns:
        Whether there is such a file: it has to be run.
    """
    from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES

    index, code = json.loads((folder / "model_index.json").read_text()), False
    for name, part in pipeline.components.items():
        if part is None or name not in index or foreign(type(part)) or _finds(*index[name]):
            continue
        cls, module = type(part).__name__, type(part).__module__
        bases = [getattr(sys.modules[module], base, None) for base in ALL_IMPORTABLE_CLASSES]
        imported = getattr(sys.modules.get(type(pipeline).__module__), cls, None)
        if imported is not type(part) or not any(isinstance(base, type) and isinstance(part, base) for base in bases):
            module, code = module.rpartition(".")[2], True
            line = f'"""Where the class of this part is: model_index.json has no way to say it."""\n\nfrom {type(part).__module__} import {cls}\n'
            (folder / name / f"{module}.py").write_text(line, encoding="utf-8")
        edit_index(folder, {name: [module, cls]})
    return code


def _finds(library: str, name: str) -> bool:
    """Whether diffusers finds a class under the name that it has written down."""
    import diffusers

    return hasattr(getattr(diffusers.pipelines, library, None) or importlib.import_module(library), name)


def carry_pipeline(folder: Path, pipeline: Any) -> str | None:
    """Copy the file of the pipeline's class into the folder, if no library has it; its name without .py."""
    name = type(pipeline).__name__
    if name in SHIPPED_PIPELINES:
        shutil.copyfile(resource(f"pipelines/{SHIPPED_PIPELINES[name]}.py"), folder / f"{SHIPPED_PIPELINES[name]}.py")
        return SHIPPED_PIPELINES[name]
    if not foreign(type(pipeline)):
        return None
    source = _source(type(pipeline))
    shutil.copyfile(source, folder / source.name)
    return source.stem


def _source(cls: type) -> Path:
    try:
        return Path(inspect.getfile(cls))
    except (TypeError, OSError):
        raise UserError(f"{cls.__name__} has no Python file that could travel with the student: define it in one") from None


def carry_code(folder: Path, class_name: str) -> None:
    """Copy the file of one of the toolkit's pipelines into the folder and name it in model_index.json."""
    stem = SHIPPED_PIPELINES[class_name]
    shutil.copyfile(resource(f"pipelines/{stem}.py"), folder / f"{stem}.py")
    edit_index(folder, {"_class_name": [stem, class_name]})


def edit_index(folder: Path, changes: dict[str, Any]) -> None:
    """Change entries of model_index.json."""
    index = folder / "model_index.json"
    facts = json.loads(index.read_text()) | changes
    index.write_text(json.dumps(facts, indent=2) + "\n")
