"""Compare ``distill plan`` with a real step: planned and measured peak memory of a recipe, with made-up weights.

    python tools/measure_plan.py RECIPE [--set KEY=VALUE] [--device cpu|cuda] [--json]

The step runs in a process of its own, on the networks that the configuration files describe (nothing is downloaded).
Measured is the peak over the second step, when the optimizers have their states: on CUDA ``max_memory_allocated``; on the CPU the
process's peak resident memory less that after the imports, with an allocator that gives freed blocks back at once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

GIB = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description="planned and measured peak memory of one training step")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.recipe, options.set, options.device)))
        return 0
    result = compare(options.recipe, options.set, options.device)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for part, size in result["memory"].items():
            print(f"  {part:26} {size / GIB:8.3f} GiB")
        planned, measured = result["planned"], result["measured"]
        print(f"planned {planned / GIB:.3f} GiB, measured {measured / GIB:.3f} GiB: {planned / measured - 1:+.1%}   [{result['seconds']:.1f} s a step]")
    return 0


def compare(recipe: str, overrides: list[str], device: str | None = None) -> dict[str, Any]:
    """The plan's parts and peak beside what a step took, in bytes."""
    import torch

    from distill.config import load_config
    from distill.plan import make_plan

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = make_plan(load_config(recipe, overrides), device)
    command = [sys.executable, __file__, recipe, "--child", "--device", device, *(x for o in overrides for x in ("--set", o))]
    # Big blocks are mapped and unmapped one by one: what is resident is what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"planned": plan.peak, "memory": plan.memory, "during": plan.during, **found}


def measure(recipe: str, overrides: list[str], device: str) -> dict[str, Any]:
    """Two steps of the trainer itself; the second is weighed, against what is resident after a tiny run in the same process."""
    two_steps("quickstart", ["trainer.batch_size=2", "method.critic_steps=1"], device)
    before = resident() if device == "cpu" else 0
    seconds = two_steps(recipe, overrides, device)
    return {"measured": peak(device) - before, "baseline": before, "seconds": seconds}


def two_steps(recipe: str, overrides: list[str], device: str) -> float:
    """Seconds of the second one."""
    import distill.trainer as training
    from distill.config import load_config
    from distill.run import assemble

    config = load_config(recipe, [*overrides, f"trainer.device={device}"])
    teacher = random_teacher(config, device)
    training.build = lambda config, device: assemble(config, teacher)  # type: ignore[assignment]
    training.load_data = lambda *args, **kwargs: MadeUpData(teacher, config.method.needs_images())  # type: ignore[assignment,return-value]
    with tempfile.TemporaryDirectory() as folder:
        trainer = training.Trainer(config, Path(folder))
        trainer.step(0)
        gc.collect()
        reset_peak(device)
        started = time.perf_counter()
        values = trainer.step(1)
    assert all(float(v) == float(v) for v in values.values()), "a loss is not a number"
    return time.perf_counter() - started


def random_teacher(config: Any, device: str) -> Any:
    """The recipe's teacher with random weights and no encoders."""
    import torch
    from torch.utils import _pytree as pytree

    from distill.plan_pipeline import hollow_teacher
    from distill.run import DTYPES

    section = config.teacher
    teacher = hollow_teacher(section.pipeline, DTYPES[section.dtype], section.revision, section.call, section.override)
    teacher.backbone.to_empty(device=device)
    with torch.no_grad():
        for name, p in teacher.backbone.named_parameters():
            p.uniform_(-0.02, 0.02) if p.dim() > 1 else p.fill_(float(name.endswith("weight")))
        for b in teacher.backbone.buffers():
            b.zero_()

    def value(like: Any) -> Any:
        return torch.randn(like.shape, device=device).to(like.dtype) if like.is_floating_point() else torch.zeros_like(like, device=device)

    def real(tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, value, tree)

    denoiser, encode = teacher.denoiser, teacher.condition
    denoiser.call = replace(denoiser.call, constants=real(dict(denoiser.call.constants)))

    def condition(inputs: Any, negative: Any = None) -> Any:
        found = encode(inputs, negative)
        return replace(found, values=real(dict(found.values)), null=None if found.null is None else real(dict(found.null)))

    teacher.condition = condition
    return teacher


class MadeUpData:
    """Batches of one condition and random samples."""

    def __init__(self, teacher: Any, images: bool) -> None:
        self.teacher, self.images = teacher, images
        self.condition = teacher.condition([teacher.placeholder()])

    def batch(self, index: int, size: int) -> tuple[Any, Any]:
        import torch

        x0 = torch.randn(size, *self.teacher.sample_shape, device=self.teacher.device, dtype=self.teacher.denoiser.dtype) if self.images else None
        return x0, self.condition[[0] * size] if self.condition.values else self.condition


# -- the process's memory -----------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def reset_peak(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        resident()
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


if __name__ == "__main__":
    sys.exit(main())
