"""The code of a model card, copied into a process that has diffusers and has never heard of this toolkit, makes the student's images."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_student
from zoo import CASES

from distill.export import export_diffusers, export_few_step, export_lora
from distill.roles import LoRA
from distill.running import after_steps, before_calls
from distill.student import Student

FAMILIES = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline", "SanaPipeline", "DiTPipeline",
)
HEAD = """
import numpy as np, torch, diffusers
diffusers.utils.logging.disable_progress_bar()

def call(pipe, name, *args, **settings):
    pipe.set_progress_bar_config(disable=True)
    result = pipe(*args, **settings, generator=torch.Generator().manual_seed(5), output_type="np")
    np.save(name + ".npy", result.images)
    return result
"""


def blocks(folder: Path) -> list[str]:
    """The Python code of a card, with paths as of the working folder."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def run(folder: Path, codes: dict[str, str]) -> None:
    """Each of the codes in one fresh process, in its own namespace; its pictures go to NAME.npy."""
    lines = [HEAD]
    for name, code in codes.items():
        noted = code.replace(str(folder) + "/", "").replace("image = pipe(", f"image = call(pipe, {name!r}, ")
        lines.append(f"exec(compile({noted!r}, {name!r}, 'exec'), dict(globals()))")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def student_of(name: str, times: tuple[float, ...], gamma: float, lora: bool) -> Student:
    case = CASES[name]
    return tiny_student(case.build(), times, len(times), lora=LoRA(rank=4, alpha=8) if lora else None, call=case.call(), gamma=gamma)


def ours(student: Student) -> np.ndarray[Any, Any]:
    """The student's picture of the input that cards show, from the noise that the teacher's pipeline draws: some draw it in
    another layout than that of their samples."""
    teacher = student.teacher
    shown = {"prompt": "a photograph of a cat", "class_labels": 3}[str(teacher.input_name)]
    generator, again = (torch.Generator().manual_seed(5) for _ in range(2))
    run = {"guidance": teacher.settings["off"]}
    step = teacher._runner.run([shown], **run, generator=again, stop=after_steps(1)).steps[0]
    teacher._runner.run([shown], **run, generator=generator, stop=before_calls(1, teacher.backbone_name))  # what follows is fresh noise
    noise = step.sample / getattr(step.scheduler, "init_noise_sigma", 1.0)
    images = teacher.decode(student.sample_from(teacher.condition([shown]), noise, generator=generator))
    return images.permute(0, 2, 3, 1).numpy()


def check(folder: Path, names: tuple[str, ...]) -> None:
    codes: dict[str, str] = {}
    wanted: dict[str, np.ndarray[Any, Any]] = {}
    for name in names:
        facts: dict[str, Any] = {"method": "dmd2", "teacher_name": f"teacher-{name}"}
        CASES[name].build().save_pretrained(folder / f"teacher-{name}")
        # One step for the stock schedulers: some classes draw the noise of later steps from the global generator. Two for the pipeline file.
        full, adapted, odd = (student_of(name, *s) for s in (((1.0,), 1.0, False), ((1.0,), 1.0, True), ((1.0, 0.3777), 1.0, False)))
        export_diffusers(full, folder / f"{name}-stock", **facts)
        export_lora(adapted, folder / f"{name}-lora", **facts)
        export_few_step(odd, folder / f"{name}-few", **facts)
        for form, student in (("stock", full), ("lora", adapted), ("few", odd)):
            for i, code in enumerate(blocks(folder / f"{name}-{form}")):
                codes[f"{name}-{form}-{i}"], wanted[f"{name}-{form}-{i}"] = code, ours(student)
        assert {f"{name}-stock-0", f"{name}-stock-1", f"{name}-lora-0", f"{name}-few-0"} <= codes.keys()
    run(folder, codes)
    for key, images in wanted.items():
        assert images.std() > 0.01, key
        assert np.abs(np.load(folder / f"{key}.npy") - images).max() <= 1e-4, key


@pytest.mark.slow
def test_cards_of_many_families(tmp_path: Path) -> None:
    check(tmp_path, FAMILIES)
