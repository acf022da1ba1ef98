"""The loop: exact resume, exact accumulation, isolation of the roles, signals, and steps that are not finite."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint
from distill.config import Config, dump, load_config
from distill.errors import UserError
from distill.logs import read_metrics
from distill.run import load_student
from distill.trainer import Interrupted, Trainer

DMD2 = """\
teacher: {pipeline: assets/digits-teacher}
student: {ema: 0.9}
method:
  name: dmd2
  critic_steps: 2
  divergence: forward_kl
  gan: {weight: 0.5, features: teacher, layers: [mid_block, down_blocks.0.resnets.0]}
data: {source: digits}
optimizers: {student: {lr: 1e-4, decay: cosine, warmup: 2}}
trainer: {steps: 8, batch_size: 4, log_every: 1, checkpoint_every: 3, sample_every: 0, device: cpu}
output: {folder: FOLDER}
"""
CONSISTENCY = DMD2[: DMD2.index("method:")] + """\
method: {name: consistency, steps: 2, discretization: [4, 16], ema_decay: 0.8}
""" + DMD2[DMD2.index("data:"):]

FLOW_MAP = CONSISTENCY.replace("{name: consistency, steps: 2, discretization: [4, 16], ema_decay: 0.8}", "{name: flow_map, network: ema, ema_decay: 0.8}")


def config_for(folder: Path, text: str = DMD2, *overrides: str) -> Config:
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(text.replace("FOLDER", str(folder)))
    config = load_config(recipe, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    return config


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def largest_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    assert [r["step"] for r in a] == [r["step"] for r in b] and all(x.keys() == y.keys() for x, y in zip(a, b, strict=True))
    return max(abs(x[k] - y[k]) for x, y in zip(a, b, strict=True) for k in x)


class Killed(Exception):
    pass


KINDS = {
    "full": "ema: 0.9", "lora": "ema: 0.9, weights: lora, lora: {rank: 2}", "dora": "ema: 0.9, weights: lora, lora: {rank: 2, dora: true}",
    "selected": "ema: 0.9, ema_dtype: bfloat16, train: [mid_block, '*.attentions'], freeze: ['*.bias']",
    "smaller": "ema: 0.9, ema_device: cpu, architecture: {block_out_channels: [16, 24]}",
}
SAVING = "device: cpu, gradient_checkpointing: true, offload: true"


@pytest.mark.parametrize("recipe", [
    DMD2, CONSISTENCY, *(DMD2.replace("ema: 0.9", KINDS[k]) for k in ("lora", "dora", "selected")),
    CONSISTENCY.replace("device: cpu", SAVING).replace("ema: 0.9", KINDS["smaller"]),
    *(FLOW_MAP.replace("ema: 0.9", KINDS[k]) for k in ("lora", "selected")), FLOW_MAP.replace("device: cpu", SAVING).replace("ema: 0.9", KINDS["smaller"]),
])
def test_resumed_equals_uninterrupted(tmp_path: Path, recipe: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Trainer(config_for(whole, recipe), whole).fit()
    config = config_for(broken, recipe)
    trainer = Trainer(config, broken)
    step = trainer.step

    def fatal(index: int) -> Any:
        if index == 5:
            raise Killed
        return step(index)

    trainer.step = fatal  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.fit()
    assert checkpoint.steps(broken / "checkpoints") == [3]
    resumed = Trainer(config, broken, resume=True)
    assert resumed.start == 3
    resumed.fit()
    assert largest_difference(rows(whole), rows(broken)) <= 1e-6
    first, _ = load_student(whole)
    second, _ = load_student(broken)
    for a, b in zip(first.denoiser.parameters(), second.denoiser.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Two micro-batches of 4 give the gradient of one of 8, when all randomness is the same."""
    gradients = []
    for split in (False, True):
        folder = tmp_path / str(split)
        trainer = Trainer(config_for(folder, CONSISTENCY, "trainer.batch_size=4", f"trainer.accumulate={2 if split else 1}"), folder)
        parts = [trainer._batch(0, i, 0.0) for i in range(2)]
        student = trainer.parameters["student"]
        if split:
            batches = parts
        else:
            from distill.denoiser import cat
            from distill.methods.base import Batch

            assert parts[0].x0 is not None and parts[1].x0 is not None
            noise = torch.cat([p.noise for p in parts])
            batches = [Batch(noise, cat([p.condition for p in parts]), torch.cat([parts[0].x0, parts[1].x0]), 0.0)]
        drawn = iter([0.1, 0.3, 0.6, 0.9, 0.8, 0.7, 0.4, 0.2])

        def fixed(like: torch.Tensor, drawn: Any = drawn) -> torch.Tensor:
            return torch.tensor([next(drawn) for _ in like], dtype=torch.float64)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distill.matching.times.strata", fixed)
            for batch in batches:
                _, loss, _ = next(iter(trainer.method.step(trainer.roles, batch)))
                (loss / len(batches)).backward(inputs=student)
        gradients.append([p.grad.clone() for p in student if p.grad is not None])
        assert next(drawn, None) is None
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_each_update_changes_its_own_role_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(config_for(folder), folder)
    teacher = [p.clone() for p in trainer.parts.teacher.backbone.parameters()]
    update, seen = trainer._update, []

    def watched(role: str, step: int) -> float:
        before = {r: [p.clone() for p in ps] for r, ps in trainer.parameters.items()}
        with_gradient = {r for r, ps in trainer.parameters.items() if any(p.grad is not None for p in ps)}
        norm = update(role, step)
        changed = {r for r, ps in trainer.parameters.items() if any(not torch.equal(a, b) for a, b in zip(before[r], ps, strict=True))}
        seen.append((role, changed, with_gradient))
        return norm

    trainer._update = watched  # type: ignore[method-assign]
    trainer.step(3)
    assert [s[0] for s in seen] == ["student", "critic", "discriminator", "critic", "discriminator"]
    assert all(changed == {role} == with_gradient for role, changed, with_gradient in seen)
    assert all(torch.equal(a, b) for a, b in zip(teacher, trainer.parts.teacher.backbone.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.parts.teacher.backbone.parameters())


def test_steps_that_are_not_finite_are_dropped_and_end_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(config_for(folder, DMD2, "trainer.steps=40"), folder)
    before = [p.clone() for p in trainer.parameters["student"]]
    with torch.no_grad():
        for p in trainer.parts.teacher.backbone.parameters():
            p.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite.*lower optimizers"):
        trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters["student"], strict=True))


def test_a_signal_saves_and_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(config_for(folder, DMD2, "trainer.checkpoint_every=100"), folder)
    step = trainer.step

    def stopped(index: int) -> Any:
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(index)

    trainer.step = stopped  # type: ignore[method-assign]
    with pytest.raises(Interrupted) as caught:
        trainer.fit()
    assert caught.value.signum == signal.SIGTERM and caught.value.step == 3
    assert checkpoint.steps(folder / "checkpoints") == [3]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_runs_of_one_process_may_differ_in_precision(tmp_path: Path) -> None:
    for precision in ("no", "bf16", "no"):
        trainer = Trainer(config_for(tmp_path / "run", CONSISTENCY, f"trainer.mixed_precision={precision}"), tmp_path / "run")
        assert trainer.accelerator.mixed_precision == precision and math.isfinite(float(trainer.step(0)["student/loss"]))


def test_averaged_weights_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(config_for(folder), folder)
    trainer.step(0)
    trained = [p.clone() for p in trainer.parameters["student"]]
    with trainer.averaged():
        inside = [p.clone() for p in trainer.parameters["student"]]
        assert all(torch.equal(a, b) for a, b in zip(inside, trainer.ema.values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(inside, trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trained, trainer.parameters["student"], strict=True))


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    """SIGKILL the command line at random moments, also before the first checkpoint, until the run is through."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    text = DMD2.replace("steps: 8", "steps: 30").replace("checkpoint_every: 3", "checkpoint_every: 2")
    Trainer(config_for(whole, text), whole).fit()
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(text.replace("FOLDER", str(broken)))
    chance, kills = random.Random(1), 0
    command = [sys.executable, "-m", "distill", "train", str(recipe)]
    for attempt in range(12):
        process = subprocess.Popen(command + (["--resume"] if broken.exists() else []), stderr=subprocess.PIPE, text=True)
        if attempt < 3:
            deadline = time.monotonic() + 60
            start = len(rows(broken))
            while process.poll() is None and len(rows(broken)) <= start and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.4))
            kills += process.poll() is None
            process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert process.returncode == 0 and kills >= 2
    assert largest_difference(rows(whole), rows(broken)) <= 1e-6
    assert json.loads((broken / "student" / "model_index.json").read_text())["_class_name"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_has_states_and_is_saved(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(config_for(folder, DMD2.replace("ema: 0.9", KINDS[kind]), "trainer.steps=1"), folder)
    backbones = {r: getattr(trainer.roles, r).backbone for r in ("teacher", "student", "critic")}
    before = {r: {n: p.clone() for n, p in b.named_parameters()} for r, b in backbones.items()}
    trainer.fit()
    tensors, _ = checkpoint.load(folder / "checkpoints", 1)
    for role in ("student", "critic"):
        named = trainer.roles.named_parameters(role)
        trained = {id(p) for p in named.values()}
        assert {n.removeprefix(f"{role}/") for n in tensors if n.startswith(f"{role}/")} == set(named)
        states = [n for n in tensors if n.startswith(f"optimizer.{role}.") and n.endswith(".exp_avg")]
        assert len(states) == len(named) and sum(tensors[n].numel() for n in states) == sum(p.numel() for p in named.values())
        fixed = {n: p for n, p in backbones[role].named_parameters() if id(p) not in trained}
        mine = {id(p) for r in ("student", "critic") for p in trainer.roles.parameters(r)}
        assert all(torch.equal(p, before[role][n]) for n, p in fixed.items() if id(p) not in mine)
        assert bool(fixed) == (kind in ("lora", "dora", "selected"))
    assert {n.removeprefix("ema/") for n in tensors if n.startswith("ema/")} == set(trainer.roles.named_parameters("student"))
    assert all(t.dtype == (torch.bfloat16 if kind == "selected" else torch.float32) for n, t in tensors.items() if n.startswith("ema/"))
    frozen = {n: p for n, p in backbones["teacher"].named_parameters() if "lora_" not in n}
    assert all(torch.equal(p, before["teacher"][n]) for n, p in frozen.items())


def test_memory_options_change_no_loss(tmp_path: Path) -> None:
    options = ("trainer.gradient_checkpointing=true", "trainer.offload=true", "trainer.attention=sdpa", "student.ema_device=cpu")
    for recipe, name in ((DMD2, "dmd2"), (CONSISTENCY, "consistency")):
        plain, saving = tmp_path / name, tmp_path / f"{name}-saving"
        Trainer(config_for(plain, recipe, "trainer.steps=4"), plain).fit()
        trainer = Trainer(config_for(saving, recipe, "trainer.steps=4", *options), saving)
        assert len(trainer.parts.waiting) == (1 if name == "dmd2" else 2)
        trainer.fit()
        assert largest_difference(rows(plain), rows(saving)) <= 1e-5
