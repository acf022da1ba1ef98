"""``distill teachers``: which pipelines were checked, and what probing finds in one of the user's own."""

from __future__ import annotations

import json
from typing import Any

import torch

from distill.call import Affine
from distill.errors import UserError
from distill.resources import resource
from distill.teacher import Teacher
from distill.walk import Rescaled, Walk

CHECKED = "assets/teachers.json"


def checked() -> list[dict[str, Any]]:
    """One row per pipeline class: name, task, result ("works", "works with override", "no"), and why not."""
    rows: list[dict[str, Any]] = json.loads(resource(CHECKED).read_text(encoding="utf-8"))["pipelines"]
    return rows


def print_checked(task: str | None = None) -> None:
    """The table of checked pipelines, those that work first.

    Raises:
        UserError: if no pipeline of that task was checked.
    """
    rows = checked()
    tasks = sorted({r["task"] for r in rows})
    if task is not None and task not in tasks:
        raise UserError(f"there is no task {task!r}; known: {', '.join(tasks)}")
    for row in sorted((r for r in rows if task in (None, r["task"])), key=lambda r: (r["result"] == "no", r["task"], r["name"])):
        print(f"{row['name']:52} {row['task']:18} {row['result']}{': ' + row['why'] if row.get('why') else ''}")
    works = sum(r["result"] != "no" for r in rows)
    print(f"\n{works} of {len(rows)} pipeline classes work. Any other is probed the same way: distill teachers PATH")


@torch.no_grad()
def describe(teacher: Teacher) -> list[tuple[str, str]]:
    """What probing found, as (title, words)."""
    call, denoiser = teacher.denoiser.call, teacher.denoiser
    parameters = sum(p.numel() for p in teacher.backbone.parameters())
    conditions = teacher.condition([teacher.placeholder()])
    shapes = ", ".join(f"{k} {_shape(v)}" for k, v in conditions.values.items()) or "none"
    guidance = "none"
    if teacher.guidance is not None:
        how = "one doubled batch" if teacher.guidance.copies == 2 else "two calls"
        order = "conditional half second" if teacher.guidance.conditional else "conditional half first"
        guidance = f"{teacher.guidance.argument}, {how}, {order}, rule {teacher.guidance.rule}"
    if call.embedded is not None:
        guidance += f"; the backbone takes a guidance scale in {call.embedded[0]}"
    found = [
        ("pipeline", type(teacher.pipeline).__name__),
        ("backbone", f"{teacher.backbone_name}: {type(teacher.backbone).__name__}, {parameters:,} parameters"),
        ("predicts", denoiser.kind + (", negated" if call.sign < 0 else "")),
        ("schedule", f"{type(denoiser.schedule).__name__}, from {type(teacher.scheduler(5)).__name__}"),
        *_loop(teacher.walk),
        ("sample", "×".join(map(str, teacher.sample_shape))),
        ("state", ", ".join([call.state, *call.others]) + (f", {type(call.enter).__name__.lower()}" if call.enter else "")),
        ("time", ", ".join(f"{k} = {_affine(v)}" for k, v in call.times.items())),
        ("input", teacher.input_name or "none"),
        ("conditions", shapes),
        ("guidance", guidance),
    ]
    if call.alone:
        found.append(("batch", "one sample per call of the network: a batch is computed sample by sample"))
    if denoiser.companions:
        found.append(("with it", ", ".join(f"{c.name}: {type(c.module).__name__}" for c in denoiser.companions)))
    found.append(("replayed", f"difference of at most {teacher.check(float('inf')):.1e}"))
    found.append(("reproduced", f"difference of at most {teacher.reproduce():.1e} after 5 steps of its own scheduler"))
    if teacher.guidance is not None:
        found.append(("", f"difference of at most {teacher.reproduce(guidance=3.0):.1e} with guidance 3"))
    return found


def _loop(walk: Walk) -> list[tuple[str, str]]:
    """What the pipeline does between its scheduler and its backbone, if anything."""
    said = []
    if isinstance(walk.own, Rescaled):
        said.append(f"scales the sample from {type(walk.schedule).__name__} by the {walk.own.norm} of its coefficients, gives the scheduler {walk.kind}")
    if walk.floor:
        said.append(f"divides by no sigma below {walk.floor:g}")
    return [("its loop", "; ".join(said))] if said else []


def print_description(teacher: Teacher) -> None:
    """What probing found, for people."""
    for title, words in describe(teacher):
        print(f"{title:11} {words}")


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "×".join(map(str, value.shape[1:])) or "scalar"
    return f"one of {_shape(value[0].unsqueeze(0))} each" if isinstance(value[0], torch.Tensor) else repr(value[0])


def _affine(affine: Affine) -> str:
    scale = "…" if isinstance(affine.scale, torch.Tensor) and affine.scale.dim() else f"{float(affine.scale):g}"
    return f"{scale}·timestep" + (f" + {affine.shift:g}" if affine.shift else "")
