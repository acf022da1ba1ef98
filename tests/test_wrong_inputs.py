"""What users get wrong: exit code 2, one clear line, no traceback, nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_stable_diffusion

from distill.cli import main
from distill.resources import resource

RECIPE = """\
teacher: {pipeline: assets/digits-teacher}
method:
  name: dmd2
  critic_steps: 1
  gan: {weight: 1.0, features: teacher}
data: {source: digits}
trainer: {steps: 2, batch_size: 4, sample_every: 0, checkpoint_every: 1, device: cpu}
output: {folder: run}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # argparse's own refusals
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> None:
    before = sorted(str(p) for p in Path.cwd().rglob("*"))
    code, errors = run(capsys, *arguments)
    lines = [line for line in errors.splitlines() if line.strip()]
    assert code == 2, errors
    assert len(lines) == 1 and "Traceback" not in errors, errors
    assert message in lines[0], lines[0]
    assert sorted(str(p) for p in Path.cwd().rglob("*")) == before, "something was written"


def train(*overrides: str, text: str = RECIPE) -> list[str]:
    Path("recipe.yaml").write_text(text)
    return ["train", "recipe.yaml", *(a for o in overrides for a in ("--set", o))]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.critic_step=2", "did you mean 'critic_steps'"),
        ("teacher.pipeline=no/such/folder", "does not exist"),
        ("teacher.pipeline=nobody/no-such-model", "could not be loaded"),
        ("method.critic_steps=two", "valid integer, not 'two'"),
        ("trainer.steps=-3", "greater than or equal to 1, not -3"),
        ("method.steps=12", "less than or equal to 8, not 12"),
        ("evaluate={metrics: [fd-digits], steps: [4]}", "at most 1 steps, not 4"),
        ("student={weights: lora, lora: {rank: 0}}", "greater than or equal to 1, not 0"),
        ("student={weights: lora, lora: {rank: 2, targets: [nowhere]}}", "no layer of UNet2DModel is named 'nowhere'"),
        ("data={source: none}", "needs real images"),
        ("data={source: prompts, path: recipe.yaml}", "needs real images"),
        ("data={source: images, path: nowhere}", "does not exist"),
        ("trainer.mixed_precision=fp16", "fp16 needs a CUDA device"),
        ("trainer.device=cuda", "no CUDA device"),
        ("output.folder=recipe.yaml/run", "not a folder"),
        ("output.folder=/proc/distill-run", "cannot be written"),
        ("evaluate.metrics=[fd-digit]", "did you mean 'fd-digits'"),
        ("method.gan.layers=[no_block]", "no such module"),
        ("method.divergence=forward_lk", "'forward_kl'"),
        ("method.name=dmd22", "did you mean 'dmd2'"),
        ("teacher.pipeline=recipe.yaml", "is a file"),
        ("optimizers.student.lr=0", "greater than 0, not 0"),
    ],
)
def test_settings(capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    refused(capsys, message, *train(override))


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "did you mean 'quickstart'", "train", "quickstrat")
    refused(capsys, "name a recipe", "train")
    Path("broken.yaml").write_text("teacher: [")
    refused(capsys, "broken.yaml:1: not valid YAML", "train", "broken.yaml")
    Path("twice.yaml").write_text("seed: 1\nseed: 2\n")
    refused(capsys, "twice.yaml:2: the key 'seed' is given twice", "train", "twice.yaml")


def teacher_copy() -> Path:
    folder = Path("teacher")
    shutil.copytree(resource("assets/digits-teacher"), folder)
    return folder


def test_broken_teachers(capsys: pytest.CaptureFixture[str]) -> None:
    folder = teacher_copy()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(capsys, "corrupt or truncated", *train("teacher.pipeline=teacher"))
    refused(capsys, "corrupt or truncated", "sample", "teacher")
    weights.unlink()
    torch.save({"x": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(capsys, "pickled weights", *train("teacher.pipeline=teacher"))
    (folder / "model_index.json").write_text("{")
    refused(capsys, "not valid JSON", *train("teacher.pipeline=teacher"))
    (folder / "model_index.json").unlink()
    refused(capsys, "has no model_index.json", *train("teacher.pipeline=teacher"))


def test_code_in_a_folder_is_not_run_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    folder = teacher_copy()
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["evil", "Evil"]}))
    refused(capsys, "needs its own code", "sample", "teacher")
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet2d.py").write_text("open('ran', 'w')\n")  # a tampered copy of a pipeline that we ship
    assert run(capsys, "sample", "teacher", "--count", "1", "--steps", "1")[0] == 0
    assert not Path("ran").exists()


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("images")
    for label in range(2):
        (folder / str(label)).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 9), dtype=np.uint8)).save(folder / str(label) / f"{i}.png")
    assert run(capsys, *train("data={source: images, path: images}"))[0] == 0
    shutil.rmtree("run")
    broken = folder / "1" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refused(capsys, "images/1/1.png is not a readable image", *train("data={source: images, path: images}"))
    broken.unlink()
    Image.new("L", (8, 8)).save(folder / "loose.png")
    refused(capsys, "one sub-folder per class", *train("data={source: images, path: images}"))
    Path("empty").mkdir()
    refused(capsys, "holds no images", *train("data={source: images, path: empty}"))


def test_runs_and_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *train())[0] == 0
    refused(capsys, "holds a run already", *train())
    refused(capsys, "resume it with its own recipe", *train("method.critic_steps=3"), "--resume")
    refused(capsys, "full weights cannot be exported as a LoRA", "export", "run", "--to", "lora", "--out", "lora")
    refused(capsys, "not a training run", "export", "nowhere")
    kohya = train("student={weights: lora, lora: {rank: 2}}", "output={folder: kohya, export: [lora-kohya]}")
    refused(capsys, "no kohya names are known for a UNet2DModel", *kohya)  # before it trains, not after
    assert not Path("kohya").exists()
    refused(capsys, "--max-shard-size big is no size: write it as 5GB", "export", "run", "--max-shard-size", "big")
    refused(capsys, "are for whole pipelines", "export", "run", "--to", "lora", "--variant", "fp16")
    refused(capsys, "--push student is no repository: write it as owner/name", "export", "run", "--push", "student")
    refused(capsys, "full weights cannot be exported as a LoRA", "export", "run", "--to", "lora-kohya", "--out", "k")
    refused(capsys, "should be at least 1, not 0", "sample", "run", "--steps", "0")
    refused(capsys, "class labels go from 0 to 9", "sample", "run", "--inputs", "12")
    refused(capsys, "takes class labels", "sample", "run", "--inputs", "three")
    refused(capsys, "cannot be written", "sample", "run", "--out", "no/such/folder/grid.png")
    refused(capsys, "did you mean 'accuracy'", "eval", "run", "--metrics", "acuracy")
    refused(capsys, "--reference", "eval", "run", "--metrics", "fid", "--samples", "2")
    newest = Path("run/checkpoints/step-00000002/state.safetensors")
    newest.write_bytes(newest.read_bytes()[:-100])
    refused(capsys, "is corrupt", "export", "run", "--out", "again")
    refused(capsys, "delete the folder to resume from the checkpoint before it (step 1)", *train(), "--resume")
    Path("model.ckpt").write_bytes(b"\x80\x04")
    for command in ("sample", "eval", "export"):
        refused(capsys, "pickle checkpoint, which is never read", command, "model.ckpt")
    Path("thesis").mkdir()
    Path("thesis/text").write_text("x")
    refused(capsys, "not empty and holds no run", *train("output.folder=thesis"), "--overwrite")


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "there is no method 'dmd22'", "verify", "dmd22")
    refused(capsys, "there is no divergence 'kl'", "verify", "dmd2", "--divergence", "kl")
    refused(capsys, "there is no method 'x'", "methods", "x")
    refused(capsys, "invalid choice", "frobnicate")
    refused(capsys, "unrecognized arguments", "methods", "dmd2", "--frobnicate")


def test_text_teachers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_stable_diffusion().save_pretrained("sd", safe_serialization=True)
    capsys.readouterr()
    text = RECIPE.replace("assets/digits-teacher", "sd").replace("  gan: {weight: 1.0, features: teacher}\n", "")
    refused(capsys, "digits has 8×8 grey images", *train(text=text))
    refused(capsys, "needs prompts", *train("data.source=none", text=text))
    Path("prompts.txt").write_text("\n\n")
    refused(capsys, "holds no prompts", *train("data={source: prompts, path: prompts.txt}", text=text))
    refused(capsys, "takes prompts", "sample", "sd")
    refused(capsys, "give prompts", "eval", "sd", "--metrics", "clip-score", "--samples", "2")
    Path("prompts.txt").write_text("a cat\n")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("open_clip.create_model_and_transforms", offline)  # the real one waits long for a network
    refused(capsys, "clip-score needs", "eval", "sd", "--metrics", "clip-score", "--samples", "1", "--steps", "1", "--prompts", "prompts.txt")


def test_disk_full_while_writing_a_checkpoint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.checkpoint.save_file", full)
    code, errors = run(capsys, *train())
    assert code == 2 and "No space left" in errors and "Traceback" not in errors
    assert not [p for p in Path("run/checkpoints").iterdir() if not p.name.startswith(".")]
