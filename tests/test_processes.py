"""Several processes: two with half of the batch each are one with all of it, and the run is written by one of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint
from distill.logs import read_metrics

pytestmark = pytest.mark.slow

RECIPE = """\
teacher: {pipeline: assets/digits-teacher}
student: {ema: 0.9}
method: {name: METHOD}
data: {source: digits}
optimizers: {student: {lr: 1e-4, clip: 0}}
trainer: {steps: 4, batch_size: 4, log_every: 1, checkpoint_every: 2, sample_every: 0, device: cpu}
evaluate: {metrics: [fd-digits], samples: 40, batch_size: 20}
output: {folder: FOLDER}
"""
RATIO = "dmd2, critic_steps: 1, divergence: forward_kl, gan: {weight: 0.5, features: teacher, layers: [mid_block]}"


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A command in two processes, as torchrun and accelerate start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})


def write(folder: Path, method: str, name: str = "run") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.replace("METHOD", method).replace("FOLDER", str(folder / name)))
    return path


class Fixed:
    """The same random numbers for the same samples of the whole batch, whichever process they are in."""

    def __init__(self, trainer: Any, whole: int) -> None:
        draw = torch.Generator().manual_seed(7)
        rank, size = trainer.accelerator.process_index, trainer.config.trainer.batch_size
        mine = slice(rank * size, (rank + 1) * size)
        self.noise = torch.randn(whole, *trainer.parts.teacher.sample_shape, generator=draw)[mine]
        self.index = torch.randint(1000, (whole,), generator=draw)[mine]


def gradients(recipe: Path, batch_size: int, out: Path) -> None:
    """In one of the processes (or the only one): the first update's gradient, after it is shared; and what the processes hold after two steps."""
    from distill.config import load_config
    from distill.methods.base import Batch
    from distill.trainer import Trainer

    trainer = Trainer(load_config(recipe, [f"trainer.batch_size={batch_size}"]), recipe.parent)
    fixed, make = Fixed(trainer, 8), trainer._batch
    seen: dict[str, torch.Tensor] = {}

    def batch(step: int, micro: int, progress: float) -> Batch:
        made = make(step, micro, progress)
        seen[f"labels{step}"] = made.condition.values["class_labels"]
        return Batch(fixed.noise, made.condition, made.x0, progress)

    class Kept(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.update({f"gradient{i}": p.grad.clone() for i, p in enumerate(trainer.parameters["student"]) if p.grad is not None})
            super().step(closure)

    trainer._batch = batch  # type: ignore[method-assign]
    trainer.optimizers = {"student": Kept(trainer.parameters["student"], 0.1)}  # type: ignore[dict-item]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda n, shape, **_: fixed.index % n)
        trainer.step(0)
        trainer.step(1)
    torch.save(seen | {f"weight{i}": p.detach() for i, p in enumerate(trainer.parameters["student"])}, out.with_suffix(f".{trainer.accelerator.process_index}"))


def test_two_processes_are_one_with_their_batches_together(tmp_path: Path) -> None:
    recipe = write(tmp_path, "consistency, discretization: [8, 8]")
    done = launch([__file__, str(recipe), "4", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    alone = subprocess.run([sys.executable, __file__, str(recipe), "8", str(tmp_path / "one")], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("one.0", "two.0", "two.1"))
    assert torch.equal(torch.cat([first["labels1"], second["labels1"]]), one["labels1"]) and one.keys() == first.keys()
    for name, value in one.items():
        if name.startswith(("gradient", "weight")):
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
            assert torch.equal(first[name], second[name])
    assert any(v.any() for n, v in one.items() if n.startswith("gradient"))


def test_one_process_writes_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole, broken = write(tmp_path, RATIO, "whole"), write(tmp_path, RATIO, "broken")
    done = launch(["-m", "distill", "train", str(whole)])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training dmd2") == 1 and "in 2 processes" in done.stderr and done.stderr.count("exported the student") == 1
    assert len(json.loads((tmp_path / "whole" / "results.json").read_text())) == 2
    assert [r["step"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert launch(["-m", "distill", "train", str(whole)]).returncode != 0  # it is there already
    done = launch(["-m", "distill", "train", str(broken)])
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "broken" / "checkpoints"
    for path in (folder / "step-00000004").iterdir():
        path.unlink()
    (folder / "step-00000004").rmdir()
    done = launch(["-m", "distill", "train", str(broken), "--resume"])
    assert done.returncode == 0, done.stderr
    (a, _), (b, _) = (checkpoint.load(tmp_path / name / "checkpoints", 4) for name in ("whole", "broken"))
    assert a.keys() == b.keys() and "state/ratio_means" in a
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=1e-6)


def test_networks_that_one_process_has_no_sample_for(tmp_path: Path) -> None:
    """With one sample each, every step leaves a process without one for at least one of the two students; both are trained."""
    recipe = write(tmp_path, "msd, critic_steps: 1")
    recipe.write_text(recipe.read_text().replace("batch_size: 4", "batch_size: 1").replace("metrics: [fd-digits], ", ""))
    done = launch(["-m", "distill", "train", str(recipe)])
    assert done.returncode == 0, done.stderr
    tensors, _ = checkpoint.load(tmp_path / "run" / "checkpoints", 4)
    first, second = (tensors[f"student/{k}.conv_in.weight"] for k in (1, 2))
    states = [tensors[name] for name in tensors if name.startswith("optimizer.student") and name.endswith("exp_avg")]
    assert not torch.equal(first, second) and len(states) == sum(name.startswith("student/") for name in tensors)


if __name__ == "__main__":
    gradients(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
