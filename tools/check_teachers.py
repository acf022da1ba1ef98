"""Check the universal teacher against tiny instances of every pipeline class of the installed diffusers release.

    python tools/check_teachers.py                    all of them; writes assets/teachers.json and docs/teachers.md
    python tools/check_teachers.py FluxPipeline …     these only; prints, writes nothing (with --update: their rows)

For each: probing, replaying the recorded calls, reproducing the pipeline's own sample with its own scheduler (with and
without guidance), and for text-to-image and class-to-image one DMD2 and one consistency step on adapters and the export.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import pkgutil
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from distill.errors import UserError  # noqa: E402
from distill.export import export_diffusers, export_few_step  # noqa: E402
from distill.methods.base import Batch  # noqa: E402
from distill.methods.consistency import Consistency  # noqa: E402
from distill.methods.dmd2 import DMD2  # noqa: E402
from distill.overrides import OVERRIDES  # noqa: E402
from distill.progress import track  # noqa: E402
from distill.roles import build_roles  # noqa: E402
from distill.student import Student  # noqa: E402
from distill.teacher import Teacher  # noqa: E402

TABLE = ROOT / "assets" / "teachers.json"
TOLERANCE = 1e-4  #: of samples, over their largest value
GUIDANCE = 3.0
TRAINED = ("text-to-image", "class-to-image")
STEPS = 4


def load_cases() -> dict[str, Any]:
    """All cases of tests/zoo."""
    import zoo
    from zoo.core import CASES

    for module in pkgutil.iter_modules(zoo.__path__):
        if not module.name.startswith("test_"):
            importlib.import_module(f"zoo.{module.name}")
    return CASES


def check(case: Any) -> dict[str, Any]:
    """One row of the table; "result" is "works", "works with override" or "no", and "why" says why not."""
    row: dict[str, Any] = {"name": case.name, "task": case.task, "result": "no"}
    try:
        teacher = Teacher(case.build(), case.call())
        row["guidance"] = teacher.guidance.rule if teacher.guidance else "embedded" if teacher.denoiser.call.embedded else None
        row["replayed"] = teacher.check(float("inf"))
        row["unguided"] = teacher.reproduce(STEPS)
        if teacher.guidance is not None:
            row["guided"] = teacher.reproduce(STEPS, GUIDANCE)
        differences = [row[k] for k in ("replayed", "unguided", "guided") if k in row]
        if not all(d <= TOLERANCE for d in differences):
            worst = float(torch.tensor(differences).max())  # NaN, if there is one
            return row | {"why": f"differs by {worst:.0e} from the pipeline's own sample"}
        if case.task in TRAINED:
            student = train(teacher)
            row["trained"] = True
            row["exported"] = exported(student)
    except UserError as error:
        return row | {"why": re.sub(r"^\w+ cannot be a teacher( yet)?: ", "", str(error).partition(". If you know it")[0])}
    except Exception as error:  # whatever goes wrong inside any of 300 pipelines is a row of the table
        logging.debug(traceback.format_exc())
        return row | {"why": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]}
    return row | {"result": "works with override" if case.name in OVERRIDES else "works"}


def exported(student: Student) -> str:
    """The form in which the student goes home, proven by reloading it: with a stock scheduler where there is one for it."""
    why = ""
    with tempfile.TemporaryDirectory() as folder:
        for form, write in (("stock scheduler", export_diffusers), ("few-step pipeline", export_few_step)):
            try:
                write(student, Path(folder) / "student", method="dmd2", teacher_name="teacher")
                return form
            except Exception as error:  # whatever any pipeline may raise
                logging.debug(traceback.format_exc())
                why = f"no: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return why


def train(teacher: Teacher) -> Student:
    """Two steps of DMD2 (in the first one critic and teacher still agree) and of consistency distillation with full weights.

    Returns:
        The DMD2 student, of two steps.

    Raises:
        AssertionError: if a step changes anything but the student (and the critic), or nothing.
    """
    torch.manual_seed(0)
    condition = teacher.condition([teacher.placeholder()] * 2)
    x0 = torch.randn(2, *teacher.sample_shape)
    student: Student | None = None
    for method in (DMD2(critic_steps=1, steps=2), Consistency(target="stop_gradient")):
        roles, _ = build_roles(teacher, method.roles)
        student = student or Student(teacher, roles.student, method.sampler())
        before = {r: [p.clone() for p in roles.parameters(r)] for r in method.roles}
        frozen = [p.clone() for p in teacher.backbone.parameters()]
        updates = (u for _ in range(2) for u in method.step(roles, Batch(torch.randn_like(x0), condition, x0)))
        for role, loss, _ in updates:
            parameters = roles.parameters(role)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    if g is not None:
                        p -= 1e-3 * g.sign()
        for role in method.roles:
            assert any(not torch.equal(a, b) for a, b in zip(before[role], roles.parameters(role), strict=True)), f"{method.name} did not change the {role}"
            assert all(bool(p.isfinite().all()) for p in roles.parameters(role)), f"{method.name} made the {role} infinite"
        assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.backbone.parameters(), strict=True)), f"{method.name} changed the teacher"
    assert student is not None
    return student


def markdown(rows: list[dict[str, Any]]) -> str:
    """docs/teachers.md."""
    works = [r for r in rows if r["result"] != "no"]
    lines = [
        "# Teachers", "",
        f"Made by `python tools/check_teachers.py` with diffusers {diffusers.__version__}: {len(works)} of {len(rows)} pipeline classes work.",
        "Every pipeline was built with tiny random networks and probed; its recorded calls were replayed; its own sampling was reproduced with",
        "its own scheduler, with and without guidance, to 1e-4 in float32; and for text-to-image and class-to-image pipelines two DMD2 and two",
        "consistency steps changed the student and nothing else, and the student was exported, loaded again and compared. `distill teachers PATH`",
        "does the first three for any pipeline.", "",
        "| task | work | of |", "|---|---:|---:|",
    ]
    for task in sorted({r["task"] for r in rows}):
        of = [r for r in rows if r["task"] == task]
        lines.append(f"| {task} | {sum(r['result'] != 'no' for r in of)} | {len(of)} |")
    lines += ["", "| pipeline | task | result | guidance | unguided | guided | student exported with | why not |", "|---|---|---|---|---:|---:|---|---|"]
    for row in sorted(rows, key=lambda r: (r["task"], r["name"])):
        numbers = [f"{row[k]:.0e}" if k in row else "–" for k in ("unguided", "guided")]
        cells = [row["name"], row["task"], row["result"], row.get("guidance") or "–", *numbers, row.get("exported", "–"), row.get("why", "").replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="pipeline classes; all if none is given")
    parser.add_argument("--update", action="store_true", help="write the rows of the named classes, keep all others")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if options.debug else logging.CRITICAL, format="%(message)s")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    cases = load_cases()
    names = options.names or sorted(cases)
    rows = [check(cases[name]) for name in track(names, "checking")]
    for row in rows:
        if options.names or row["result"] == "no":
            print(json.dumps(row))
    print(f"{sum(r['result'] != 'no' for r in rows)} of {len(rows)} work")
    if options.update and options.names:
        kept = {row["name"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))["pipelines"]}
        rows = sorted({**kept, **{row["name"]: row for row in rows}}.values(), key=lambda row: row["name"])
    if not options.names or options.update:
        facts = {"diffusers": diffusers.__version__, "torch": torch.__version__, "pipelines": rows}
        TABLE.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (ROOT / "docs" / "teachers.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
