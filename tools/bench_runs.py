"""What the benchmarks of the digits share: one run under a budget of CPU time, counted and measured, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METRICS = ["fd-digits", "kid", "precision", "recall", "density", "coverage", "accuracy"]
TEACHER = "assets/digits-teacher"
PILOT = 8  #: steps whose cost is measured


def train_one(recipe: str, seed: int, seconds: float, samples: int, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train, export and measure one recipe; its numbers."""
    from distill.config import dump, load_config
    from distill.trainer import Trainer

    given = [*bare_settings(seed, samples, folder), *overrides]
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
    counted = dict(passes)  # of the training alone
    return finished(trainer, folder) | {"training_steps": steps, "passes": counted, "cpu_seconds": round(spent, 1), "peak_mb": round(peak)}


def fingerprint(recipe: str, overrides: Sequence[str], seconds: float, samples: int) -> str:
    """Of all that a run's numbers depend on but its seed and the code. (The number of steps is the budget's.)"""
    from distill.config import dump, load_config

    config = dump(load_config(recipe, [*bare_settings(0, samples, Path("runs/bench")), "trainer.steps=1000", *overrides]))
    return hashlib.sha256(f"{seconds:g} {config}".encode()).hexdigest()[:12]


def bare_settings(seed: int, samples: int, folder: Path) -> list[str]:
    """Overrides of a recipe: the training alone, and one measurement at its end."""
    quiet = ["trainer.sample_every=0", "trainer.checkpoint_every=1000000", "trainer.device=cpu", "teacher.steps=1", "evaluate.steps=null"]
    return [*quiet, f"evaluate.metrics={json.dumps(METRICS)}", f"evaluate.samples={samples}", f"seed={seed}", f"output.folder={folder}"]


def finished(trainer: Any, folder: Path) -> dict[str, Any]:
    """Export the student and measure it."""
    from distill import commands

    commands.finish(trainer, folder)
    row = json.loads((folder / "results.json").read_text(encoding="utf-8"))[-1]
    return {k: row[k] for k in ("fd_digits", "kid", "precision", "recall", "density", "coverage", "accuracy")} | {"calls": row["steps"]}


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
    counted: Counter[str] = Counter()

    def watch(role: str, network: Any) -> None:
        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counts(x_t: Any, *rest: Any, **more: Any) -> Any:
                counted[role] += len(x_t)
                return call(x_t, *rest, **more)

            return counts

        network.predict = counting(network.predict)
        if hasattr(network, "backbone"):  # the others' features are a prediction
            network.features = counting(network.features)

    for role, found in vars(roles).items():
        networks = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
        for network in networks:
            if hasattr(network, "predict"):
                watch(role, network)
    return counted


def measure_teacher(steps: int, seed: int, samples: int) -> dict[str, Any]:
    """The teacher at so many steps; the seed is the noise's."""
    from distill.evaluate.run import Entry, evaluate
    from distill.loading import load_pipeline
    from distill.resources import resource as shipped

    (row,) = evaluate([Entry("teacher", load_pipeline(str(shipped(TEACHER))), steps)], METRICS, samples=samples, seed=seed)
    return {k: row[k] for k in ("fd_digits", "kid", "precision", "recall", "density", "coverage", "accuracy")} | {"calls": steps}


def say(text: str) -> None:
    """Progress, where somebody looks on."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def in_a_process(script: str, arguments: Sequence[str], result: Path) -> None:
    """Run a tool for one result; its output goes into a log beside it. A failure leaves no result, and is tried again next time."""
    if result.is_file():
        return
    say(f"{result.parent.parent.name}, seed {result.parent.name.removeprefix('seed-')}")
    result.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with (result.parent / "log.txt").open("w", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, script, *arguments, "--result", str(result)], stdout=log, stderr=log, env=environment, cwd=ROOT).returncode
    if code:
        say(f"  failed, see {result.parent / 'log.txt'}")
