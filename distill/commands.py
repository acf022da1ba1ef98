"""What the commands do, in terms of the library. ``cli.py`` reads the arguments and prints the errors."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill import config as configs
from distill import export as exporting
from distill.config import Config
from distill.errors import UserError
from distill.evaluate import run as evaluation
from distill.evaluate.grid import comparison_grid
from distill.evaluate.report import write_report
from distill.evaluate.table import print_table
from distill.loading import load_pipeline
from distill.resources import find
from distill.run import is_run, load_student
from distill.student import Student
from distill.trainer import Interrupted, Trainer

_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def say(text: str) -> None:
    """A line about progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def device_of(name: str) -> str:
    """The device that "auto" means here, or the one named.

    Raises:
        UserError: if it is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: leave out --device, or use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no MPS device here: leave out --device, or use --device cpu")
    return name


# -- train --------------------------------------------------------------------------------------------------------------


def train(config: Config, resume: bool, overwrite: bool) -> int:
    """Train, export, measure and report. Returns the exit code: 0, or 128 + the signal that ended the run."""
    folder = config.output.folder.expanduser()
    _prepare(folder, config, resume, overwrite)
    try:
        trainer = Trainer(config, folder, resume)
    except UserError:
        if not resume:
            _remove_if_empty(folder)
        raise
    _write_text(folder / "config.yaml", configs.dump(config))
    steps = config.trainer.steps
    say(f"training {config.method.name} for {steps - trainer.start:,} steps on {trainer.device} → {folder}")
    started = time.perf_counter()
    try:
        trainer.fit()
    except Interrupted as stop:
        say(f"stopped after step {stop.step}, saved; continue with: distill train {folder} --resume")
        return 128 + stop.signum
    if not trainer.accelerator.is_main_process:
        return 0
    seconds = time.perf_counter() - started
    if steps > trainer.start:
        say(f"trained {steps - trainer.start:,} steps in {seconds:.0f} s")
    finish(trainer, folder)
    return 0


def finish(trainer: Trainer, folder: Path) -> None:
    """Export the averaged student and, if the recipe asks for metrics, measure it beside its teacher and report."""
    config, student = trainer.config, trainer.parts.student
    facts: dict[str, Any] = {"method": config.method.name, "teacher_name": config.teacher.pipeline, "overwrite": True}
    with trainer.averaged():
        if "lora" in config.output.export:
            exporting.export_lora(student, folder / "lora", **facts)
            say(f"exported the adapter → {folder / 'lora'}")
        exporting.export_diffusers(student, folder / "student", **facts)
    say(f"exported the student → {folder / 'student'}")
    if not config.evaluate.metrics:
        return
    rows = _measure(config, folder, str(trainer.device))
    with trainer.averaged():
        exporting.export_diffusers(student, folder / "student", metrics=rows, **facts)
    _write_text(folder / "results.json", json.dumps(rows, indent=2) + "\n")
    print_table(rows)
    grids = _side_by_side(trainer, folder)
    write_report(folder, rows, grids, configs.dump(config))
    say(f"pictures → {folder / 'samples.png'}   report → {folder / 'report.html'}   numbers → {folder / 'results.json'}")
