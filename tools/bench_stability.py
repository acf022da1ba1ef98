"""Do DMD2, SiD and f-distill finish? Ten seeds at three learning rates each, with a heat map.

    python tools/bench_stability.py --problem analytic --jobs 2 --picture docs/images/stability-analytic.png
    python tools/bench_stability.py --problem digits --seconds 40 --jobs 2 --picture docs/images/stability-digits.png

``analytic``: a ring of eight modes (tools/toys.py), every method with its default settings, distance sliced Wasserstein. ``digits``: the
recipes of the three methods for so many CPU seconds each, distance FD digits. All rates of a recipe are multiplied by 1/3, 1 and 3. Each run
leaves a JSON file; one that is there is skipped when the tool is started again.

A run has **collapsed** if one of these holds at its end:

* not finite: its samples are not, or the trainer stopped because ten gradients in a row were not;
* lost: its distance is above the start's, that is of the network that it began as, in one step;
* outlier: its distance is above three times the median over the seeds of its method and rate;
* narrow: diversity below one half. Diversity is the smaller of coverage and spread over the teacher's (analytic: the mass that its modes have
  in common with the teacher's, and the root of the total variance), for digits coverage alone (the share of real images with a sample nearby).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_runs import ROOT, in_a_process, measure_teacher, train_one
from heat_map import Cell, draw

METHODS = ("dmd2", "sid", "f_distill")
RECIPES = {"dmd2": "quickstart", "sid": "sid/digits", "f_distill": "f_distill/digits"}
FACTORS = (1 / 3, 1.0, 3.0)
STEPS, BATCH = 250, 128  #: of an analytic run
OUTLIER, NARROW = 3.0, 0.5


def label(factor: float) -> str:
    return "÷3" if factor < 1 else f"×{factor:g}"


# -- one run ------------------------------------------------------------------------------------------------------------


def analytic(name: str, seeds: Sequence[int], out: Path) -> None:
    """The missing runs of one method; "teacher" is where they start."""
    from toys import ADVERSARY, make_toy, samples, scores, train_toy

    from distill.methods.dmd2 import DMD2
    from distill.methods.f_distill import FDistill
    from distill.methods.sid import SiD

    toy = make_toy("ring")
    if name == "teacher":
        for what, x in (("start", samples(toy.network)[0]), ("teacher", toy.teacher.sample(4000))):
            write(out / what / "result.json", scores(toy.teacher, x))
        return
    method = {"dmd2": DMD2(), "sid": SiD(), "f_distill": FDistill(gan=ADVERSARY)}[name]
    for factor in FACTORS:
        missing = [s for s in seeds if not cell_path(out, name, factor, s).is_file()]
        if missing:
            drawn, spent = train_toy(toy, method, missing, STEPS, factor, batch=BATCH)
            for seed, x in zip(missing, drawn, strict=True):
                write(cell_path(out, name, factor, seed), scores(toy.teacher, x) | spent)


def digits(name: str, factor: float, seed: int, seconds: float, samples: int, out: Path) -> None:
    """One run on the digits; likewise."""
    from distill.config import load_config
    from distill.errors import UserError

    if name == "teacher":
        for what, steps in (("start", 1), ("teacher", 50)):
            write(out / what / "result.json", of_digits(measure_teacher(steps, seed, samples)))
        return
    optimizers = load_config(RECIPES[name], []).optimizers
    roles = ("student", "critic") + (() if name == "sid" else ("discriminator",))
    rates = [f"optimizers.{role}.lr={optimizers.of(role).lr * factor!r}" for role in roles]
    result = cell_path(out, name, factor, seed)
    try:
        numbers = of_digits(train_one(RECIPES[name], seed, seconds, samples, rates, result.parent / "run"))
    except UserError as error:
        if "not finite" not in str(error):
            raise
        numbers = {"finite": False, "distance": None, "coverage": 0.0, "why": str(error)}
    write(result, numbers)


def of_digits(row: dict[str, Any]) -> dict[str, Any]:
    finite = math.isfinite(row["fd_digits"])
    return row | {"finite": finite, "distance": row["fd_digits"] if finite else None}


def write(path: Path, numbers: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# -- the grid -----------------------------------------------------------------------------------------------------------


def run_all(given: argparse.Namespace, out: Path) -> None:
    """Whatever has no result yet; the analytic runs of one method share a process, those of one rate a network."""
    asked = ["--problem", given.problem, "--seconds", str(given.seconds), "--samples", str(given.samples), "--out", str(out)]
    together = given.problem == "analytic"
    groups = [(FACTORS, given.seeds)] if together else [((f,), [s]) for s in given.seeds for f in FACTORS]
    with ThreadPoolExecutor(given.jobs) as pool:
        pool.submit(in_a_process, __file__, [*asked, "--one", "teacher"], out / "teacher" / "result.json")
        for factors, seeds in groups:
            for method in given.methods:
                missing = [p for f in factors for s in seeds if not (p := cell_path(out, method, f, s)).is_file()]
                if missing:
                    one = ["--one", method, "--factor", repr(factors[0]), "--seeds", *map(str, seeds)]
                    pool.submit(in_a_process, __file__, [*asked, *one], missing[0])


def cell_path(out: Path, method: str, factor: float, seed: int) -> Path:
    return out / f"{method}-{label(factor)}" / f"seed-{seed}" / "result.json"


def judge(out: Path, methods: Sequence[str], seeds: Sequence[int]) -> tuple[list[dict[str, Any]], dict[tuple[str, float, int], Cell]]:
    """A row of the table for each method and rate, and the cells of the heat map."""
    start, teacher = read(out / "start" / "result.json"), read(out / "teacher" / "result.json")
    assert start is not None and teacher is not None, "the teacher could not be measured: see teacher/log.txt"
    rows, cells = [], {}
    for method in methods:
        for factor in FACTORS:
            found = {s: r for s in seeds if (r := read(cell_path(out, method, factor, s))) is not None}
            finite = [r["distance"] for r in found.values() if r["finite"]]
            median = statistics.median(finite) if finite else math.inf
            reasons = {s: collapse(r, start, teacher, median) for s, r in found.items()}
            for s, r in found.items():
                ratio = r["distance"] / teacher["distance"] if r["finite"] else math.inf
                cells[method, factor, s] = Cell(ratio, reasons[s])
            diversity = [narrowness(r, teacher) for r in found.values()]
            rows.append({
                "method": method, "rate": label(factor), "runs": len(found), "median": median, "worst": max(finite, default=math.inf),
                "median_over_teacher": median / teacher["distance"], "least_diversity": min(diversity, default=math.nan),
                "collapsed": sum(r is not None for r in reasons.values()), "why": sorted({r for r in reasons.values() if r}),
            })
    return rows, cells


def narrowness(run: dict[str, Any], teacher: dict[str, Any]) -> float:
    return min(run[k] / teacher[k] for k in ("coverage", "spread") if k in run)


def collapse(run: dict[str, Any], start: dict[str, Any], teacher: dict[str, Any], median: float) -> str | None:
    """Why it counts as collapsed, or None."""
    if not run["finite"]:
        return "not finite"
    if run["distance"] > start["distance"]:
        return "lost"
    if run["distance"] > OUTLIER * median:
        return "outlier"
    return "narrow" if narrowness(run, teacher) < NARROW else None


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    titles = ["method", "rates", "runs", "median distance", "over the teacher's", "worst", "least diversity", "collapsed"]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    for r in rows:
        numbers = (f"{r['median']:.3g}", f"{r['median_over_teacher']:.2f}", f"{r['worst']:.3g}", f"{r['least_diversity']:.2f}")
        why = f" ({', '.join(r['why'])})" if r["why"] else ""
        lines.append("| " + " | ".join([r["method"], r["rate"], str(r["runs"]), *numbers, f"{r['collapsed']}{why}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=["analytic", "digits"], default="analytic")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--seconds", type=float, default=40, help="CPU seconds of each training on the digits")
    parser.add_argument("--samples", type=int, default=5000, help="of each measurement on the digits")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, help="runs/stability-PROBLEM if not given")
    parser.add_argument("--picture", type=Path, help="write the heat map there (PNG)")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--factor", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = (given.out or ROOT / "runs" / f"stability-{given.problem}").absolute()
    if given.one:
        if given.problem == "analytic":
            analytic(given.one, given.seeds, out)
        else:
            digits(given.one, given.factor, given.seeds[0], given.seconds, given.samples, out)
        return 0
    run_all(given, out)
    rows, cells = judge(out, given.methods, given.seeds)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    if given.markdown:
        given.markdown.write_text(table, encoding="utf-8")
    if given.picture:
        given.picture.parent.mkdir(parents=True, exist_ok=True)
        columns = {m: [(label(f), [cells.get((m, f, s)) for s in given.seeds]) for f in FACTORS] for m in given.methods}
        distance = "sliced Wasserstein distance" if given.problem == "analytic" else "FD digits"
        draw(columns, [str(s) for s in given.seeds], f"{distance} over the teacher's").save(given.picture)
    print(table, end="")
    missing = len(given.methods) * len(FACTORS) * len(given.seeds) - len(cells)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
