"""What the commands do, in terms of the library. ``cli.py`` reads the arguments and prints the errors."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from distill import config as configs
from distill import export as exporting
from distill.config import Config
from distill.data.prompts import read_prompts
from distill.errors import UserError
from distill.evaluate import run as evaluation
from distill.evaluate.generate import class_count, default_inputs, generate
from distill.evaluate.grid import comparison_grid, plain_grid, to_image
from distill.evaluate.metrics import Context, check_metric
from distill.evaluate.report import write_report
from distill.evaluate.run import Entry
from distill.evaluate.table import print_table
from distill.export import push as pushing
from distill.export.files import check_shard_size
from distill.loading import conditioned_on, load_pipeline
from distill.resources import find
from distill.run import DTYPES, is_run, load_student
from distill.student import Student
from distill.teacher import Teacher
from distill.trainer import Interrupted, Trainer

#: How long processes wait for each other: the first one encodes all of the data. (A launcher ends all when one has failed.)
PATIENCE = timedelta(hours=24)
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
    state = PartialState(cpu=config.trainer.device == "cpu", timeout=PATIENCE)
    if state.is_main_process:
        _prepare(folder, config, resume, overwrite)
    state.wait_for_everyone()
    try:
        trainer = Trainer(config, folder, resume)
        exporting.check_forms(trainer.parts.student, config.output.export)
    except UserError:
        if not resume and state.is_main_process:
            _remove_if_empty(folder)
        raise
    steps, several = config.trainer.steps, f" in {state.num_processes} processes" if state.num_processes > 1 else ""
    if state.is_main_process:
        _write_text(folder / "config.yaml", configs.dump(config))
        say(f"training {config.method.name} for {steps - trainer.start:,} steps on {trainer.device}{several} → {folder}")
    started = time.perf_counter()
    try:
        trainer.fit()
    except Interrupted as stop:
        if state.is_main_process:
            say(f"stopped after step {stop.step}, saved; continue with: distill train {folder} --resume")
        return 128 + stop.signum
    if not state.is_main_process:  # one process exports and measures
        return 0
    seconds = time.perf_counter() - started
    if steps > trainer.start:
        say(f"trained {steps - trainer.start:,} steps in {seconds:.0f} s")
    finish(trainer, folder)
    return 0


def finish(trainer: Trainer, folder: Path) -> None:
    """Export the averaged student and, if the recipe asks for metrics, measure it beside its teacher and report."""
    config, student = trainer.config, trainer.parts.student
    if config.teacher.quantize != "none" and student.adapters is not None:
        student, _ = load_student(folder, trainer.device)  # the adapter on the teacher as it is
    with trainer.averaged():
        _export_all(config, student, folder, None)
        picture = _side_by_side(config, student, trainer.sample_inputs())
    say(f"exported the student → {folder / 'student'}")
    picture.save(folder / "samples.png")
    rows: list[dict[str, Any]] = []
    if config.evaluate.metrics:
        rows = _measure(config, folder, str(trainer.device))
        with trainer.averaged():
            _export_all(config, student, folder, rows)
        _write_text(folder / "results.json", json.dumps(rows, indent=2) + "\n")
        print_table(rows)
    load = (folder / "student" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    title = f"{config.method.name}: {config.teacher.pipeline} in {student.sampler.steps} step{'s' * (student.sampler.steps > 1)}"
    write_report(folder, title, rows, [("Samples from equal noise", picture)], configs.dump(config), load)
    numbers = f"   numbers → {folder / 'results.json'}" if rows else ""
    say(f"pictures → {folder / 'samples.png'}   report → {folder / 'report.html'}{numbers}")


def _export_all(config: Config, student: Student, folder: Path, rows: list[dict[str, Any]] | None) -> None:
    facts: dict[str, Any] = {"method": config.method.name, "teacher_name": config.teacher.pipeline, "overwrite": True, "metrics": rows}
    if "lora" in config.output.export:
        exporting.export_lora(student, folder / "lora", **facts)
    if "lora-kohya" in config.output.export:
        exporting.export_lora(student, folder / "lora-kohya", names="kohya", **facts)
    if "few-step" in config.output.export:
        exporting.export_few_step(student, folder / "few-step", **facts)
    _export_pipeline(student, folder / "student", **facts)


def _export_pipeline(student: Student, folder: Path, **facts: Any) -> None:
    """Write the student in the teacher's own class or, where no stock scheduler samples it, with a pipeline file of its own."""
    try:
        exporting.export_diffusers(student, folder, **facts)
    except exporting.NoStockScheduler as error:
        say(f"{str(error).split(': use --to')[0]}: exported with a pipeline file of its own")
        exporting.export_few_step(student, folder, **facts)


def _measure(config: Config, folder: Path, device: str) -> list[dict[str, Any]]:
    """Rows for the teacher and for the exported student (what is measured is what ships) at each number of steps."""
    section, teacher = config.evaluate, config.teacher
    prompts = read_prompts(find(section.prompts)) if section.prompts else None
    options: dict[str, Any] = {"device": device, "trust_remote_code": teacher.trust_remote_code, "dtype": DTYPES[teacher.dtype]}
    original = load_pipeline(teacher.pipeline, revision=teacher.revision, variant=teacher.variant, **options)
    distilled = exporting.load_export(folder / "student", **options)
    guidance = exporting.call_guidance(config.method.sampler())
    entries = [Entry("teacher", original, teacher.steps, teacher.guidance_scale)]
    for steps in section.steps or [config.method.sampler().steps]:
        entries.append(Entry(f"student, {steps} step{'s' * (steps > 1)}", distilled, steps, guidance))
    say(f"measuring {', '.join(section.metrics)} on {section.samples:,} samples of {len(entries)} samplers")
    return evaluation.evaluate(
        entries, section.metrics, samples=section.samples, batch_size=section.batch_size, seed=section.seed, prompts=prompts,
        context=Context(device=device),
    )


def _side_by_side(config: Config, student: Student, inputs: list[Any]) -> Image.Image:
    """Teacher and student from equal noise, a block each (a block per number of student steps)."""
    teacher, section = student.teacher, config.teacher
    inputs = [inputs[i % len(inputs)] for i in range(max(len(inputs), 30 if teacher.classes == 10 else len(inputs)))]
    noise = teacher.noise(len(inputs), torch.Generator().manual_seed(config.seed))
    steps_of_teacher = teacher.sample(teacher.condition(inputs), noise, section.steps, section.guidance_scale, torch.Generator().manual_seed(1))
    blocks = [(f"teacher, {section.steps} steps", teacher.decode(steps_of_teacher))]
    for steps in config.evaluate.steps or [student.sampler.steps]:
        images = student.images(inputs, steps=steps, noise=noise, generator=torch.Generator().manual_seed(1))
        blocks.append((f"student, {steps} step{'s' * (steps > 1)}", images))
    return comparison_grid(blocks, columns=min(10, len(inputs)))


def _prepare(folder: Path, config: Config, resume: bool, overwrite: bool) -> None:
    """Refuse what would lose or mix runs; leave a folder that can be written."""
    if is_run(folder):
        if resume:
            _same_run(folder, config)
        elif overwrite:
            shutil.rmtree(folder)
        else:
            raise UserError(
                f"{folder} holds a run already: continue it with --resume, replace it with --overwrite, "
                "or choose another folder with --set output.folder=…"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: choose another output.folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output.folder: {folder} cannot be written: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"output.folder: {folder} cannot be written")


#: Settings that a resumed run may change: they do not touch what is learnt.
_FREE = (
    "output", "evaluate", "trainer.log_every", "trainer.sample_", "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.device", "trainer.compile"
)


def _same_run(folder: Path, config: Config) -> None:
    """Refuse to resume with another recipe: the result would be of neither."""
    before = configs.load_config(folder / "config.yaml")

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for name, child in tree.items() for k, v in flat(child, f"{prefix}.{name}" if prefix else name).items()}

    old, new = flat(before.model_dump(mode="json")), flat(config.model_dump(mode="json"))
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key) and not key.startswith(_FREE):
            raise UserError(
                f"the run in {folder} has {key}: {old.get(key)}, the recipe has {new.get(key)}: "
                f"resume it with its own recipe (distill train {folder} --resume)"
            )


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


# -- sample, eval, export -----------------------------------------------------------------------------------------------


def open_pipeline(name: str, device: str, trust_remote_code: bool = False) -> tuple[Any, int | None, float | None]:
    """(pipeline, steps, guidance scale) of a run, an export or any pipeline; None: the pipeline's own default.

    Raises:
        UserError: if there is nothing that can be sampled.
    """
    path = find(name)
    if path.suffix in _PICKLES:
        raise UserError(f"{name} is a pickle checkpoint, which is never read (it can run any code): convert it to a diffusers folder in safetensors first")
    if path.is_dir() and is_run(path):
        if not (path / "student").is_dir():
            raise UserError(f"{name} has no exported student yet: distill export {name}")
        path = path / "student"
    facts = exporting.read_facts(path) if path.is_dir() else None
    if facts is not None and facts["form"] == "lora":
        raise UserError(f"{name} is a LoRA: load it onto its teacher ({facts['teacher']}) as its README.md shows, or export with --to diffusers")
    if facts is not None:
        pipeline = exporting.load_export(path, device=device, trust_remote_code=trust_remote_code)
        return pipeline, facts["sampler"].steps, facts["guidance_scale"]
    return load_pipeline(str(path) if path.is_dir() else name, device=device, trust_remote_code=trust_remote_code), None, None


def sample(options: argparse.Namespace) -> int:
    """``distill sample``: a grid, or one file per image where --out is no .png."""
    device = device_of(options.device)
    as_files = options.out.suffix.lower() != ".png"
    _check_output(options.out, as_files)
    pipeline, steps, guidance = open_pipeline(options.path, device, options.trust_remote_code)
    inputs = _inputs(pipeline, options.inputs, options.count)
    images = generate(
        pipeline, inputs, steps=options.steps or steps, seed=options.seed, batch_size=64,
        guidance_scale=guidance if options.guidance_scale is None else options.guidance_scale,
    ).images
    if as_files:
        options.out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            to_image(image).save(options.out / f"{i:05d}.png")
    else:
        plain_grid(images, columns=min(10, len(images)), path=options.out)
    say(f"{len(images)} images → {options.out}")
    return 0


def _inputs(pipeline: Any, given: Sequence[str] | None, count: int | None) -> list[Any]:
    kind = conditioned_on(pipeline)
    if kind is None:
        if given:
            raise UserError("this pipeline is unconditional: leave out --inputs")
        return [None] * (count or 16)
    if kind == "prompt":
        if not given:
            raise UserError('this pipeline takes prompts: --inputs "a red apple" "a blue car"')
        return [given[i % len(given)] for i in range(count or len(given))]
    classes = class_count(pipeline)
    if given is None:
        return default_inputs(pipeline, count or classes)
    try:
        labels = [int(text) for text in given]
    except ValueError:
        raise UserError(f"this pipeline takes class labels, 0 to {classes - 1}: --inputs 3 7") from None
    if any(not 0 <= label < classes for label in labels):
        raise UserError(f"class labels go from 0 to {classes - 1}")
    return [labels[i % len(labels)] for i in range(count or len(labels))]


def _check_output(path: Path, is_folder: bool) -> None:
    """Refuse an output that cannot be written before anything is computed."""
    place = path if is_folder and path.exists() else path.absolute().parent
    if is_folder and path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file: name a .png, a .json or a folder")
    existing = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK) or (not is_folder and not place.is_dir()):
        raise UserError(f"--out {path} cannot be written: {place} is not a folder that can be written")


def evaluate(options: argparse.Namespace) -> int:
    """``distill eval``."""
    device = device_of(options.device)
    for name in options.metrics:
        check_metric(name)
    if options.out is not None:
        _check_output(options.out, False)
    prompts = read_prompts(find(options.prompts)) if options.prompts else None
    entries = []
    for name in options.paths:
        pipeline, steps, guidance = open_pipeline(name, device, options.trust_remote_code)
        guidance = guidance if options.guidance_scale is None else options.guidance_scale
        entries.append(Entry(name, pipeline, options.steps or steps, guidance))
    rows = evaluation.evaluate(
        entries, options.metrics, samples=options.samples, batch_size=options.batch_size, seed=options.seed, prompts=prompts,
        context=Context(options.reference, device),
    )
    print_table(rows)
    if options.out is not None:
        _write_text(options.out, json.dumps(rows, indent=2) + "\n")
    return 0


def probe(options: argparse.Namespace) -> int:
    """``distill teachers PATH``: what probing finds in a pipeline."""
    from distill import yamltree
    from distill.overrides import find_override
    from distill.teachers import print_description

    call: dict[str, Any] = {}
    for assignment in options.call:
        yamltree.override(call, assignment)
    pipeline = load_pipeline(options.path, device=device_of(options.device), trust_remote_code=options.trust_remote_code)
    print_description(Teacher(pipeline, call, find_override(options.override, type(pipeline).__name__)))
    return 0


def export(options: argparse.Namespace) -> int:
    """``distill export``."""
    path, form = options.path, options.to
    if path.suffix in _PICKLES:
        raise UserError(f"{path} is a pickle checkpoint, which is never read: name a run folder")
    check_shard_size(options.max_shard_size)
    lora = form is not None and form.startswith("lora")
    if lora and (options.max_shard_size or options.variant):
        raise UserError("--max-shard-size and --variant are for whole pipelines: a LoRA is one small file in the precision that it was trained in")
    if options.push:
        pushing.check_reachable(options.push, options.yes)
    student, config = load_student(path)
    folder = options.out or path / {None: "student", "diffusers": "student"}.get(form, form)
    results = path / "results.json"
    facts: dict[str, Any] = {
        "method": config.method.name, "teacher_name": config.teacher.pipeline, "overwrite": options.out is None,
        "metrics": json.loads(results.read_text()) if results.is_file() else None,
    }
    if lora:
        exporting.export_lora(student, folder, names="kohya" if form == "lora-kohya" else "diffusers", **facts)
    else:
        write = {None: _export_pipeline, "diffusers": exporting.export_diffusers, "few-step": exporting.export_few_step}[form]
        write(student, folder, format=exporting.Format(options.max_shard_size, options.variant), **facts)
    say(f"exported → {folder}; its README.md says how to load it")
    if options.push:
        address = pushing.push(folder, options.push, options.yes)
        say(f"uploaded → {address}" if address else "not uploaded")
    return 0
