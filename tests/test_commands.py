"""The commands end to end, on small runs: train, sample, eval, export, and what lies in a run's folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from PIL import Image
from tiny import tiny_stable_diffusion

from distill.cli import main
from distill.config import load_config, recipes
from distill.logs import read_metrics

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(recipe: str) -> list[str]:
    """A shipped recipe cut down to seconds."""
    sets = ["trainer.steps=4", "trainer.batch_size=24", "trainer.log_every=1", "trainer.sample_every=2", "trainer.checkpoint_every=2"]
    sets += ["evaluate.samples=60", "teacher.steps=4"]
    return ["train", recipe, *(a for s in sets for a in ("--set", s)), "--set", "trainer.device=cpu"]


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_trains_exports_and_loads(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(small(recipe)) == 0
    folder = load_config(recipe).output.folder
    for name in ("config.yaml", "metrics.jsonl", "results.json", "samples.png", "report.html", "student/README.md", "samples/step-00000004.png"):
        assert (folder / name).is_file(), name
    rows = json.loads((folder / "results.json").read_text())
    emoji = "emoji" in recipe
    measured = ("fd_emoji", "emoji_clip") if emoji else ("fd_digits", "accuracy")
    assert rows[0]["name"] == "teacher" and all(isinstance(r[name], float) for r in rows for name in measured)
    assert len(read_metrics(folder / "metrics.jsonl")) == 4
    assert "teacher" in capsys.readouterr().out
    assert ("FD emoji" if emoji else "FD digits") in (folder / "student" / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(folder / "student", trust_remote_code=True)
    told = {"prompt": ["orange heart", "cat face"], "guidance_scale": 1.0, "num_inference_steps": 1} if emoji else {"class_labels": [3, 5]}
    assert len(pipeline(**told).images) == 2


def test_sample_eval_and_export() -> None:
    assert main(small("quickstart")) == 0
    run = "runs/quickstart"
    assert main(["sample", run, "--out", "a.png"]) == 0 and main(["sample", f"{run}/student", "--out", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert Image.open("a.png").size == (10 * 8 + 9 * 3, 8)
    assert main(["sample", run, "--inputs", "3", "7", "--count", "5", "--out", "many"]) == 0
    assert sorted(p.name for p in Path("many").iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert main(["sample", "assets/digits-teacher", "--steps", "2", "--guidance-scale", "2", "--count", "2", "--out", "t.png"]) == 0
    assert main(["eval", run, "assets/digits-teacher", "--steps", "1", "--samples", "40", "--metrics", "accuracy,fd-digits", "--out", "rows.json"]) == 0
    rows = json.loads(Path("rows.json").read_text())
    assert [r["name"] for r in rows] == [run, "assets/digits-teacher"] and all(r["steps"] == 1 for r in rows)
    assert main(["export", run, "--out", "again"]) == 0
    for part in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert Path("again", part).read_bytes() == Path(run, "student", part).read_bytes()


def test_a_ladder_that_no_stock_scheduler_has_is_exported_with_a_pipeline_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small("quickstart"), "--set", "method.steps=2", "--set", "method.times=[1.0, 0.4]"]) == 0
    assert "no stock scheduler samples this student at its times 1, 0.4" in capsys.readouterr().err
    run = Path("runs/quickstart")
    assert json.loads((run / "student" / "model_index.json").read_text())["_class_name"] == ["pipeline", "FewStepPipeline"]
    pipeline = DiffusionPipeline.from_pretrained(run / "student", trust_remote_code=True)
    assert pipeline.scheduler.timesteps.tolist() == [999, 399] and len(pipeline([3, 5]).images) == 2
    assert main(["sample", str(run), "--out", "a.png"]) == 0  # the file is ours: no trust is asked for
    for form, file in (("few-step", "few-step/pipeline.py"), ("diffusers", None)):
        code = main(["export", str(run), "--to", form, "--max-shard-size", "100KB", "--variant", "bf16"])
        assert (code, file is None or (run / file).is_file()) == (0 if file else 2, True)
    assert sorted(p.name for p in (run / "few-step/unet").glob("*.bf16*")) != []
    assert main(["sample", str(run / "few-step"), "--out", "b.png"]) == 0


def test_lora_from_recipe_to_adapter() -> None:
    lora = ["student={weights: lora, lora: {rank: 4, alpha: 2}, ema: 0.5}", "output.export=[diffusers, lora]", "method.times=null"]
    assert main([*small("quickstart"), *(a for s in lora for a in ("--set", s))]) == 0
    merged = DiffusionPipeline.from_pretrained("runs/quickstart/student", trust_remote_code=True)
    adapted = DiffusionPipeline.from_pretrained(str(ROOT / "assets/digits-teacher"), trust_remote_code=True)
    adapted.load_lora_weights("runs/quickstart/lora")
    adapted.scheduler = LCMScheduler.from_pretrained("runs/quickstart/lora", subfolder="scheduler")
    a, b = (p([1, 2], num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt").images for p in (merged, adapted))
    assert (a - b).abs().max() <= 1e-4


LORA = "student={weights: lora, lora: {rank: 2}}"
SD = """\
teacher: {pipeline: sd, steps: 4, guidance_scale: 4.0}
student: {ema: 0.5}
method: METHOD
data: {source: images, path: images}
optimizers: {student: {lr: 1e-3}}
trainer: {steps: 3, batch_size: 2, log_every: 1, sample_every: 2, checkpoint_every: 2, device: cpu}
output: {folder: run, export: [diffusers]}
"""


def sd_pieces() -> None:
    tiny_stable_diffusion().save_pretrained("sd", safe_serialization=True)
    Path("images").mkdir()
    for i, caption in enumerate(["a red apple", "a blue car", "a green cat"]):
        Image.new("RGB", (20, 16), (80 * i, 40, 200 - 80 * i)).save(f"images/{i}.png")
        Path(f"images/{i}.txt").write_text(caption)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("{name: dmd2, steps: 2, critic_steps: 1, guidance_scale: 4.0, divergence: jensen_shannon, gan: {features: critic, layers: [mid_block]}}", []),
        ("{name: dmd2, steps: 4, critic_steps: 1, guidance_scale: 4.0}", ["data={source: prompts, path: prompts.txt}", LORA]),
        ("{name: consistency, guidance_range: [2.0, 8.0], guidance_embedding_width: 32, discretization: [4, 8]}", []),
        ("{name: consistency, guidance_scale: 3.0, target: stop_gradient, discretization: [4, 8]}", [LORA]),
    ],
)
def test_stable_diffusion_from_recipe_to_stock_pipeline(method: str, extra: list[str]) -> None:
    sd_pieces()
    Path("prompts.txt").write_text("a red apple\na blue car\n")
    Path("recipe.yaml").write_text(SD.replace("METHOD", method))
    arguments: list[str] = ["train", "recipe.yaml", *(a for e in extra for a in ("--set", e))]
    if LORA in extra:
        arguments += ["--set", "output.export=[diffusers, lora]"]
    assert main(arguments) == 0
    pipeline = DiffusionPipeline.from_pretrained("run/student")
    assert type(pipeline) is StableDiffusionPipeline and type(pipeline.scheduler) is LCMScheduler
    assert main(["sample", "run", "--inputs", "a red apple", "--out", "x.png"]) == 0
    assert main(["sample", "run", "--inputs", "a red apple", "--out", "y.png", "--seed", "1"]) == 0
    assert Path("x.png").read_bytes() != Path("y.png").read_bytes()
    if "lora" in arguments[-1]:
        fresh = tiny_stable_diffusion()
        fresh.load_lora_weights("run/lora")
    losses = [row["student/loss"] for row in read_metrics(Path("run/metrics.jsonl"))]
    assert len(losses) == 3 and all(torch.isfinite(torch.tensor(losses)))


def distill(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "distill", *arguments], env=environment, stderr=subprocess.PIPE, text=True, **settings)


def test_sigterm_saves_and_resume_ends_the_run() -> None:
    import signal
    import time

    process = distill(*small("quickstart"), "--set", "trainer.steps=500", "--set", "evaluate.metrics=[]")
    metrics = Path("runs/quickstart/metrics.jsonl")
    deadline = time.monotonic() + 60
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "saved" in errors and "Traceback" not in errors
    step = int(sorted(Path("runs/quickstart/checkpoints").glob("step-*"))[-1].name.split("-")[1])
    assert step >= 3 and "--resume" in errors
    config = Path("runs/quickstart/config.yaml")
    config.write_text(config.read_text().replace("steps: 500", f"steps: {step + 2}"))
    process = distill("train", "runs/quickstart", "--resume")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    rows = read_metrics(metrics)
    assert [r["step"] for r in rows] == list(range(step + 2)) and Path("runs/quickstart/student/unet2d.py").is_file()


def test_help_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False and set(schema["required"]) == {"teacher", "method", "output"}
    assert main(["methods"]) == 0 and "dmd2" in capsys.readouterr().out
    assert main(["train", "quickstart", "--dry-run"]) == 0 and "critic_steps: 1" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_overwrite_replaces_a_run() -> None:
    assert main(small("quickstart")) == 0
    Path("runs/quickstart/mark").write_text("x")
    assert main([*small("quickstart"), "--overwrite"]) == 0 and not Path("runs/quickstart/mark").exists()
