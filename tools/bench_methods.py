"""Every digits recipe under one budget of CPU time, next to the teacher: quality, cost, memory.

    python tools/bench_methods.py --seconds 300 --seeds 0 1 2 --out runs/bench --markdown runs/bench/table.md

Each run is a process of its own; one that is finished is skipped when the tool is started again. The number of training steps is what
the budget has room for: a pilot measures steps spread over the whole training, as a step's cost may change on the way. One thread
(OMP_NUM_THREADS=1) makes CPU seconds comparable on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METRICS = ["fd-digits", "kid", "precision", "recall", "density", "coverage", "accuracy"]
TEACHER = "assets/digits-teacher"
PILOT = 8  #: steps whose cost is measured


# -- one run, in a process of its own -----------------------------------------------------------------------------------


def train_one(recipe: str, seed: int, seconds: float, samples: int, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train, export and measure one recipe; its numbers."""
    from distill import commands
    from distill.config import dump, load_config
    from distill.trainer import Trainer

    quiet = ["trainer.sample_every=0", "trainer.checkpoint_every=1000000", "trainer.device=cpu", "teacher.steps=1", "evaluate.steps=null"]
    measured = [f"evaluate.metrics={json.dumps(METRICS)}", f"evaluate.samples={samples}"]
    given = [*quiet, *measured, f"seed={seed}", f"output.folder={folder}", *overrides]
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(recipe, given)
    steps = affordable_steps(Trainer(config, folder), seconds)
    config = load_config(recipe, [*given, f"trainer.steps={steps}"])
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    trainer = Trainer(config, folder)
    passes = count_passes(trainer.roles)
    before = time.process_time()
    trainer.fit()
    spent, peak = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    passes = Counter(passes)  # of the training alone
    commands.finish(trainer, folder)
    row = json.loads((folder / "results.json").read_text(encoding="utf-8"))[-1]
    numbers = {k: row[k] for k in ("fd_digits", "kid", "precision", "recall", "density", "coverage", "accuracy")}
    return numbers | {"calls": row["steps"], "training_steps": steps, "passes": dict(passes), "cpu_seconds": round(spent, 1), "peak_mb": round(peak)}


def affordable_steps(trainer: Any, seconds: float) -> int:
    """How many training steps the budget has room for."""
    whole = trainer.config.trainer.steps
    trainer.step(0)  # the first one pays for what all share
    at = [int((i + 0.5) * whole / PILOT) for i in range(PILOT)]
    before = time.process_time()
    for step in at:
        trainer.step(step)
    return max(PILOT, int(seconds * len(at) / (time.process_time() - before)))


def count_passes(roles: Any) -> Counter[str]:
    """Forward passes by role, in samples; counted from now on. A hidden feature that ends a pass early counts as one."""
    from distill.denoiser import Denoiser

    counted: Counter[str] = Counter()

    def watch(role: str, network: Any) -> None:
        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counts(x_t: Any, *rest: Any, **more: Any) -> Any:
                counted[role] += len(x_t)
                return call(x_t, *rest, **more)

            return counts

        network.predict, network.features = counting(network.predict), counting(network.features)

    for role, found in vars(roles).items():
        networks = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
        for network in networks:
            if isinstance(network, Denoiser):
                watch(role, network)
    return counted


def measure_teacher(steps: int, seed: int, samples: int) -> dict[str, Any]:
    """The teacher at so many steps; the seed is the noise's."""
    from distill.evaluate.run import Entry, evaluate
    from distill.loading import load_pipeline
    from distill.resources import resource as shipped

    (row,) = evaluate([Entry("teacher", load_pipeline(str(shipped(TEACHER))), steps)], METRICS, samples=samples, seed=seed)
    return {k: row[k] for k in ("fd_digits", "kid", "precision", "recall", "density", "coverage", "accuracy")} | {"calls": steps}


# -- all of them --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Progress, where somebody looks on."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def in_a_process(arguments: Sequence[str], result: Path) -> None:
    """Run this tool for one result; its output goes into a log beside it. A failure leaves no result, and is tried again next time."""
    if result.is_file():
        return
    say(f"{result.parent.parent.name}, seed {result.parent.name.removeprefix('seed-')}")
    result.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with (result.parent / "log.txt").open("w", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, __file__, *arguments, "--result", str(result)], stdout=log, stderr=log, env=environment, cwd=ROOT).returncode
    if code:
        say(f"  failed, see {result.parent / 'log.txt'}")


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
    with ThreadPoolExecutor(given.jobs) as pool:
        for seed in given.seeds:
            for name in [*recipes, *(f"teacher-{n}" for n in given.teacher_steps)]:
                result = out / name.replace("/", "~") / f"seed-{seed}" / "result.json"
                common = ["--one", name, "--seeds", str(seed), "--seconds", str(given.seconds), "--samples", str(given.samples)]
                pool.submit(in_a_process, [*common, *(f"--set={s}" for s in given.set)], result)
    rows = summarize(out, given.seeds)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    if given.markdown:
        given.markdown.write_text(table, encoding="utf-8")
    print(table, end="")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
