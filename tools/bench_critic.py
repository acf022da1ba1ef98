"""The critic's updates by need against a fixed number, at equal cost: paired seeds, equal forward passes.

    python tools/bench_critic.py --problem ring --seeds 0 1 2 3 4 5 6 7
    python tools/bench_critic.py --problem digits --seeds 0 1 2 --passes 8000 --jobs 2

Every run may make so many forward passes of a batch: student, critic and teacher together, hidden features that a discriminator asks for
included. Without an adversary a step of the student is three passes and an update of the critic two; with the quickstart's, four and
four. Whoever needs fewer critic updates makes more student steps. Learning rates fall to zero with the passes spent, and the student's last
weights are measured: an average over a fixed number of steps would favour whoever makes more of them. ``ring`` and ``unbalanced``:
tools/toys.py, DMD2 with default settings; ``digits``: the quickstart recipe. Each run leaves a JSON file; one that is there is skipped
when the tool is started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from bench_runs import ROOT, bare_settings, count_passes, finished, in_a_process

RULES = ["5", "{lag: 0.5, at_most: 10}"]
PASSES = {"ring": 3900, "unbalanced": 3900, "digits": 8000}
WARMUP = 480  #: passes on the digits: the recipe's 20 steps with five critic updates


def slug(rule: str) -> str:
    """A folder's name."""
    return "critic-" + "".join(c if c.isalnum() or c in ".-" else "_" for c in rule.replace(" ", "").strip("{}"))


def in_the_plane(problem: str, rule: str, seeds: Sequence[int], passes: int, folder: Path) -> None:
    """The missing runs of one rule on a mixture."""
    from toys import BATCH, make_toy, scores, train_toy

    from distill.matching.critic import Adaptive
    from distill.methods.dmd2 import DMD2

    settings = yaml.safe_load(rule)
    method = DMD2(critic_steps=Adaptive(**settings) if isinstance(settings, dict) else settings)
    toy = make_toy(problem)
    for seed in seeds:
        if not (result := folder / f"seed-{seed}" / "result.json").is_file():
            before = time.process_time()
            (x,), spent = train_toy(toy, method, [seed], passes=passes, average=0.0)  # alone: the need is a run's own
            updates = spent["passes"]["critic"] // BATCH - spent["steps"]
            write(result, scores(toy.teacher, x) | spent | {"updates": updates, "cpu_seconds": round(time.process_time() - before, 1)})


def on_digits(rule: str, seed: int, passes: int, samples: int, folder: Path) -> None:
    """One run of the quickstart: its steps are counted in passes, which learning rates and warm-up follow."""
    from distill.config import load_config
    from distill.trainer import Trainer

    run = folder / f"seed-{seed}" / "run"
    run.mkdir(parents=True, exist_ok=True)
    own = [f"trainer.steps={passes}", f"method.critic_steps={rule}", "student.ema=0", f"optimizers.student.warmup={WARMUP}"]
    trainer = Trainer(load_config("quickstart", [*bare_settings(seed, samples, run), *own]), run)
    counted, batch = count_passes(trainer.roles), trainer.config.trainer.batch_size
    before, steps = time.process_time(), 0
    while (done := sum(counted.values()) // batch) < passes:
        trainer.step(done)
        steps += 1
    spent: dict[str, Any] = {"steps": steps, "passes": dict(counted), "cpu_seconds": round(time.process_time() - before, 1)}
    spent["updates"] = counted["critic"] // batch - steps  # the score difference asks it once
    row = finished(trainer, run)
    write(folder / f"seed-{seed}" / "result.json", row | {"distance": row["fd_digits"]} | spent)


def write(path: Path, numbers: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def summarize(out: Path, rules: Sequence[str], seeds: Sequence[int]) -> str:
    """A table: the first rule is what the others are compared with, seed by seed."""
    titles = ["critic_steps", "seeds", "distance, mean ± sd", "paired difference ± standard error", "better on", "steps", "updates per step", "CPU s"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    base: dict[int, float] = {}
    for rule in rules:
        found = {s: json.loads(f.read_text(encoding="utf-8")) for s in seeds if (f := out / slug(rule) / f"seed-{s}" / "result.json").is_file()}
        distance = {s: r["distance"] for s, r in found.items() if r["distance"] is not None}
        base = base or distance
        both = [distance[s] - base[s] for s in distance if s in base]
        paired = "–" if base is distance else f"{statistics.fmean(both):+.3f} ± {deviation(both) / len(both) ** 0.5:.3f}" if both else "–"
        better = "–" if base is distance else f"{sum(d < 0 for d in both)} of {len(both)}"
        values, steps = list(distance.values()), [r["steps"] for r in found.values()]
        updates = [r["updates"] / r["steps"] for r in found.values()]
        cells = [
            f"`{rule}`", f"{len(values)}" + (f" ({len(found) - len(values)} not finite)" if len(values) < len(found) else ""),
            f"{statistics.fmean(values):.3f} ± {deviation(values):.3f}" if values else "–", paired, better,
            f"{statistics.fmean(steps):.0f}" if steps else "–",
            f"{statistics.fmean(updates):.1f}" if updates else "–",
            f"{statistics.fmean(r['cpu_seconds'] for r in found.values()):.0f}" if found else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=list(PASSES), default="ring")
    parser.add_argument("--rules", nargs="+", default=RULES, help="values of critic_steps; the first one is compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--passes", type=int, help="forward passes of each training; 3,900 in the plane and 8,000 on the digits if not given")
    parser.add_argument("--samples", type=int, default=5000, help="of each measurement on the digits")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, help="runs/critic-PROBLEM if not given")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = (given.out or ROOT / "runs" / f"critic-{given.problem}").absolute()
    passes = given.passes or PASSES[given.problem]
    if given.one:
        if given.problem == "digits":
            on_digits(given.one, given.seeds[0], passes, given.samples, out / slug(given.one))
        else:
            in_the_plane(given.problem, given.one, given.seeds, passes, out / slug(given.one))
        return 0
    groups = [[s] for s in given.seeds] if given.problem == "digits" else [given.seeds]
    with ThreadPoolExecutor(given.jobs) as pool:
        for seeds in groups:
            for rule in given.rules:
                result = next((p for s in seeds if not (p := out / slug(rule) / f"seed-{s}" / "result.json").is_file()), None)
                if result is not None:
                    asked = ["--problem", given.problem, "--one", rule, "--seeds", *map(str, seeds), "--passes", str(passes), "--samples", str(given.samples)]
                    pool.submit(in_a_process, __file__, [*asked, "--out", str(out)], result)
    print(summarize(out, given.rules, given.seeds), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
