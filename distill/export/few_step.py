"""The few-step pipeline file: ``pipelines/few_step.py`` with the teacher's class and the student's settings filled in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Condition
from distill.errors import UserError
from distill.experts import ByCondition, Routed
from distill.export import assembly
from distill.export.assembly import edit_index
from distill.export.calls import Plain, guidance_off
from distill.loading import FEW_STEP_FILE, SHIPPED_PIPELINES, few_step_source, quiet
from distill.sampling import way_point
from distill.schedule import Flow
from distill.student import Student
from distill.two_time import NAME as END_TIME

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "f": "f_prediction"}


def settings_of(student: Student, plain: Plain) -> dict[str, Any]:
    """The student's settings as the file holds them: the ladder as a table, and the arguments of the call.

    Raises:
        UserError: for a kind of prediction that the file's sampler does not know.
    """
    sampler, walk = student.sampler, student.teacher.walk  # the file's scheduler stands where the teacher's stood
    schedule, kind = walk.schedule, walk.kind
    prediction_type = "flow_prediction" if kind == "velocity" and isinstance(schedule, Flow) else PREDICTION_TYPES.get(kind)
    if prediction_type is None:
        raise UserError(f"the few-step pipeline file knows no {kind} prediction on a {type(schedule).__name__} schedule")
    times = torch.tensor(sampler.times, dtype=torch.float64)
    ways = torch.tensor([way_point(student.denoiser.schedule, t, sampler.gamma) for t in sampler.times], dtype=torch.float64)
    (alphas, sigmas), (way_alphas, way_sigmas) = schedule.alpha_sigma(times), schedule.alpha_sigma(ways)
    if sampler.gamma == 1:  # clean data, also where the schedule ends a little above it
        way_alphas, way_sigmas = torch.ones_like(ways), torch.zeros_like(ways)
    call = {student.teacher.steps_name: sampler.steps, **{k: v for k, v in plain.items() if assembly.is_plain(v)}}
    fixed = [] if sampler.guidance_range else [name for name in guidance_off(student, student.teacher.pipeline) if name in call]
    settings: dict[str, Any] = {
        "scheduler": {
            "timesteps": _rounded(schedule.model_time(times)), "alphas": alphas.tolist(), "sigmas": sigmas.tolist(),
            "way_alphas": way_alphas.tolist(), "way_sigmas": way_sigmas.tolist(), "prediction_type": prediction_type,
            "init_noise_sigma": float(walk.noise_scale), "data_scale": float(walk.own.data_scale), "num_train_timesteps": schedule.train_steps,
            **_unusual(student),
        },
        "call": call,
        "fixed": fixed,
    }
    if isinstance(student.denoiser, Routed):
        settings["experts"] = _experts(student.denoiser, student)
    if sampler.end_time:
        settings["end_time"] = {"name": END_TIME, "component": student.teacher.backbone_name, "times": _rounded(times), "ways": _rounded(ways)}
    component, attributes = student.teacher.scheduler_name, assembly.attributes(student.teacher.pipeline)
    settings |= {"component": component} if component != "scheduler" else {}
    settings |= {"attributes": {k: repr(v) for k, v in attributes.items()}} if attributes else {}
    return dict(json.loads(json.dumps(settings)))  # as distill.json will have it: tuples are lists


def _experts(several: Routed, student: Student) -> dict[str, Any]:
    """Which network of several answers: by place in the ladder, or by condition."""
    component, *others = several.component_names(student.teacher.backbone_name)
    named: dict[str, Any] = {"component": component, "others": others}
    route = several.route
    if isinstance(route, ByCondition):
        return named | {"argument": route.path, "axes": route.axes.tolist(), "thresholds": route.thresholds.tolist()}
    return named | {"steps": route.choose(torch.tensor(student.sampler.times, dtype=torch.float64), Condition()).tolist()}


def _unusual(student: Student) -> dict[str, Any]:
    """What only pipelines that precondition in their own loop, count time backwards, or leave timesteps out need."""
    teacher, walk = student.teacher, student.teacher.walk
    last = teacher.scheduler(student.sampler.steps).timesteps[-1:].cpu()
    clean = [float(t) for t in last if not walk.trivial and not float(walk.schedule.sigma(walk.at(t)))]
    tail = clean or [0.0] * teacher.spare_timesteps
    facts: dict[str, Any] = {"sample_scale": walk.unit, "sign": walk.sign, "tail": tail}
    return {k: v for k, v in facts.items() if v not in (1.0, [])}


def _rounded(times: Tensor) -> list[float]:
    """Times to nine digits: 999.0000000000001 is the timestep 999."""
    return [float(f"{float(t):.9g}") for t in times]


def write(folder: Path, stock: type, settings: Mapping[str, Any], scheduler: str | None = None) -> dict[str, Any]:
    """Write the file; answers what ``distill.json`` has to say of it.

    Args:
        stock: the pipeline's class; if no library has it, its file is to lie in the folder.
        scheduler: the class of diffusers that the scheduler of the file is to be one of.
    """
    stem = SHIPPED_PIPELINES.get(stock.__name__) or stock.__module__.rpartition(".")[2]
    said = {"class": stock.__name__, "module": f".{stem}" if assembly.foreign(stock) else "diffusers", "settings": dict(settings)}
    said |= {"scheduler": scheduler} if scheduler else {}
    (folder / FEW_STEP_FILE).write_text(few_step_source(said), encoding="utf-8")
    return said


def write_proven(student: Student, folder: Path, stock: type, settings: Mapping[str, Any], check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Write the file such that ``check`` is content. Some pipelines ask of what class their scheduler is, and sample otherwise
    with any other: for them the file's is one of the teacher's scheduler's class.

    Args:
        check: called with what ``write`` answers; raises a UserError if the file does not do.

    Raises:
        UserError: what ``check`` said first.
    """
    own = type(assembly.own_scheduler(student))
    problem: UserError | None = None
    for scheduler in (None, own.__name__) if not assembly.foreign(own) else (None,):
        said = write(folder, stock, settings, scheduler)
        try:
            check(said)
            return said
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def name_class(folder: Path) -> None:
    """Make the file's class the one that the folder loads as."""
    edit_index(folder, {"_class_name": [Path(FEW_STEP_FILE).stem, "FewStepPipeline"]})


def remade(folder: Path, pipeline: Any) -> Any:
    """A pipeline in the class of the folder's file, as diffusers finds it; its parts are shared."""
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    with quiet():
        cls = get_class_from_dynamic_module(str(folder), module_file=FEW_STEP_FILE, trust_remote_code=True)
        made = cls.on(pipeline)
    made.set_progress_bar_config(disable=True)
    return made
