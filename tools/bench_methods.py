"""Every digits recipe under one budget of CPU time, next to the teacher: quality, cost, memory.

    python tools/bench_methods.py --seconds 300 --seeds 0 1 2 --out runs/bench --markdown runs/bench/table.md

Each run is a process of its own; one that is finished is skipped when the tool is started again. With ``--record docs/methods.json``
what is measured is added to that file, and what is there already, of the same recipe and budget, is not measured again, on any machine.
The number of training steps is what the budget has room for: a pilot measures steps spread over the whole training, as a step's cost may
change on the way. One thread (OMP_NUM_THREADS=1) makes CPU seconds comparable on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from bench_runs import ROOT, fingerprint, in_a_process, measure_teacher, train_one


def result_of(out: Path, name: str, seed: int | str) -> Path:
    """Where the numbers of a run are."""
    return out / name.replace("/", "~") / f"seed-{seed}" / "result.json"


def restore(recorded: Sequence[dict[str, Any]], wanted: Mapping[str, str], out: Path) -> None:
    """Put the recorded runs that are still of these recipes where finished ones lie."""
    for run in recorded:
        path = result_of(out, run["name"], run["seed"])
        if wanted.get(run["name"]) == run["recipe"] and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(run["numbers"], indent=1) + "\n", encoding="utf-8")


def record(file: Path, wanted: Mapping[str, str], out: Path) -> None:
    """Add the finished runs to the file, in place of earlier ones of the same name and seed."""
    runs = {(r["name"], r["seed"]): r for r in (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else [])}
    for name, recipe in wanted.items():
        for path in result_of(out, name, "*").parent.parent.glob("seed-*/result.json"):
            seed = int(path.parent.name.removeprefix("seed-"))
            runs[name, seed] = {"name": name, "seed": seed, "recipe": recipe, "numbers": json.loads(path.read_text(encoding="utf-8"))}
    lines = ",\n".join(json.dumps(runs[key]) for key in sorted(runs))
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def summarize(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per entry: mean and standard deviation over its seeds, the teacher's rows first by their steps."""
    rows: list[dict[str, Any]] = []
    for entry in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = [json.loads(f.read_text(encoding="utf-8")) for s in seeds if (f := entry / f"seed-{s}" / "result.json").is_file()]
        row: dict[str, Any] = {"name": entry.name.replace("~", "/"), "seeds": len(found), "failed": len(seeds) - len(found)}
        for key in dict.fromkeys(k for f in found for k in f if isinstance(f[k], (int, float))):
            values = [float(f[key]) for f in found]
            row[key] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
        for role in dict.fromkeys(r for f in found for r in f.get("passes", {})):
            row[f"passes/{role}"] = {"mean": statistics.fmean([f["passes"].get(role, 0) for f in found])}
        rows.append(row)
    steps_of = {r["name"]: int(r["name"].removeprefix("teacher-")) for r in rows if r["name"].startswith("teacher-")}
    return sorted(rows, key=lambda r: (r["name"] not in steps_of, steps_of.get(r["name"], 0), r["name"]))


COLUMNS = {  #: title → (key, digits, factor)
    "calls": ("calls", 0, 1), "FD digits ↓": ("fd_digits", 3, 1), "KID ↓": ("kid", 4, 1), "precision ↑": ("precision", 3, 1), "recall ↑": ("recall", 3, 1),
    "density ↑": ("density", 3, 1), "coverage ↑": ("coverage", 3, 1), "accuracy ↑": ("accuracy", 1, 100), "steps": ("training_steps", 0, 1),
    "CPU s": ("cpu_seconds", 0, 1), "MB": ("peak_mb", 0, 1),
}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, with each distance over that of the teacher with most steps."""
    teachers = [r for r in rows if r["name"].startswith("teacher") and "fd_digits" in r]
    best = teachers[-1]["fd_digits"]["mean"] if teachers else None
    titles = ["recipe", *COLUMNS, "over the teacher's", "teacher / critic / student passes, thousands"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for row in rows:
        cells = [row["name"] + (f" ({row['failed']} of {row['failed'] + row['seeds']} failed)" if row["failed"] else "")]
        for key, digits, factor in COLUMNS.values():
            value = row.get(key)
            spread = f" ± {value['sd'] * factor:.{digits}f}" if value and value["sd"] and digits else ""
            cells.append("–" if value is None else f"{value['mean'] * factor:.{digits}f}{spread}" + ("%" if factor == 100 else ""))
        cells.append(f"{row['fd_digits']['mean'] / best:.2f}" if best and "fd_digits" in row else "–")
        passes = [row.get(f"passes/{role}", {}).get("mean") for role in ("teacher", "critic", "student")]
        cells.append(" / ".join("0" if p is None else f"{p / 1000:.0f}" for p in passes) if any(passes) else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="CPU seconds of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", help="names of recipes; every configs/*/digits.yaml and the quickstart if not given")
    parser.add_argument("--teacher-steps", type=int, nargs="*", default=[1, 4, 10, 50])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; CPU seconds stay comparable with one per core")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--record", type=Path, help="JSON file of finished runs, read and added to")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        seed = given.seeds[0]
        if given.one.startswith("teacher-"):
            numbers = measure_teacher(int(given.one.removeprefix("teacher-")), seed, given.samples)
        else:
            numbers = train_one(given.one, seed, given.seconds, given.samples, given.set, given.result.parent / "run")
        given.result.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        return 0
    recipes = given.recipes or ["quickstart", *sorted(f"{p.parent.name}/digits" for p in (ROOT / "configs").glob("*/digits.yaml"))]
    out = given.out.absolute()
    wanted = {name: fingerprint(name, given.set, given.seconds, given.samples) for name in recipes}
    wanted |= {f"teacher-{n}": f"{given.samples}" for n in given.teacher_steps}
    if given.record and given.record.is_file():
        restore(json.loads(given.record.read_text(encoding="utf-8")), wanted, out)
    recording = Lock()

    def run(name: str, seed: int) -> None:
        common = ["--one", name, "--seeds", str(seed), "--seconds", str(given.seconds), "--samples", str(given.samples)]
        in_a_process(__file__, [*common, *(f"--set={s}" for s in given.set)], result_of(out, name, seed))
        if given.record:
            with recording:
                record(given.record, wanted, out)

    with ThreadPoolExecutor(given.jobs) as pool:
        for seed in given.seeds:
            for name in wanted:
                pool.submit(run, name, seed)
    rows = summarize(out, given.seeds)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    if given.markdown:
        given.markdown.write_text(table, encoding="utf-8")
    print(table, end="")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
