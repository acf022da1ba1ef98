"""Checkpoints: exact, verified, atomic under SIGKILL."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distill import checkpoint
from distill.errors import UserError


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"x": torch.full((3,), float(step))}, {"note": step}, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3]
    tensors, facts = checkpoint.load(tmp_path, 3)
    assert torch.equal(tensors["x"], torch.full((3,), 3.0)) and facts == {"note": 3}


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    def fresh() -> Path:
        for step in (1, 2):
            target = tmp_path / f"step-{step:08d}"
            if target.exists():
                checkpoint._remove(target)
            checkpoint.save(tmp_path, step, {"x": torch.arange(100.0)}, {}, keep=5)
        return tmp_path / "step-00000002"

    path = fresh()
    data = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(data[:-8])
    with pytest.raises(UserError, match="corrupt.*step 1"):
        checkpoint.load(tmp_path, 2)
    (path / "state.safetensors").write_bytes(data[:-1] + b"\x00")
    (path / "state.safetensors").write_bytes(data[:200] + b"\x55" + data[201:])
    with pytest.raises(UserError, match="not what was written"):
        checkpoint.load(tmp_path, 2)
    (path / "state.safetensors").unlink()
    with pytest.raises(UserError, match="corrupt"):
        checkpoint.load(tmp_path, 2)
    path = fresh()
    (path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="corrupt"):
        checkpoint.load(tmp_path, 2)
    (path / "manifest.json").write_text(json.dumps({"step": 2}))
    with pytest.raises(UserError, match="corrupt"):
        checkpoint.load(tmp_path, 2)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, {"x": torch.zeros(1)}, {}, keep=1)


@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "sgd"])
def test_optimizer_state_is_exact(name: str) -> None:
    from distill.config import Optimizer
    from distill.optim import build_optimizer

    def run(split: bool) -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 3))
        optimizer = build_optimizer(Optimizer(name=name, lr=0.1), [weight])  # type: ignore[arg-type]
        for step in range(6):
            if split and step == 3:
                saved = checkpoint.optimizer_tensors(optimizer, "o")
                optimizer = build_optimizer(Optimizer(name=name, lr=0.1), [weight])  # type: ignore[arg-type]
                checkpoint.restore_optimizer(optimizer, saved, "o")
            (weight.sin().sum() * (step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach().clone()

    assert torch.equal(run(False), run(True))


_WRITER = """
import sys, torch
from pathlib import Path
from distill import checkpoint
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    checkpoint.save(Path(sys.argv[1]), step, {str(i): torch.full((200_000,), float(step)) for i in range(8)}, {"step": step}, keep=2)
"""


def test_twenty_kills_during_the_write_leave_a_good_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but write checkpoints is killed at a random moment, twenty times."""
    chance, torn = random.Random(0), 0
    for _ in range(20):
        newest = (checkpoint.steps(tmp_path) or [0])[-1]
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(newest)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while (checkpoint.steps(tmp_path) or [0])[-1] <= newest:  # at least one whole write, then strike
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        torn += any(p.name.startswith(".") for p in tmp_path.iterdir())
        saved = checkpoint.steps(tmp_path)
        assert saved and saved[-1] > newest
        for step in saved:
            tensors, facts = checkpoint.load(tmp_path, step)
            assert facts["step"] == step and all((v == step).all() for v in tensors.values())
    assert torn > 0, "no kill fell into a write: the test shows nothing"
