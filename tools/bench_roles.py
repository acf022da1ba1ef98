"""What ``trainer.batched_roles`` is worth: teacher and critic in one call against two, on one backbone with LoRA adapters.

A small text-conditional UNet (Stable Diffusion's blocks, random weights) under guidance: 2 + 1 batches apart, 3 together. The
two run in alternation on the same machine; printed are the medians, and the ratio of each pair with its spread. With
``--step`` a whole training step of DMD2 is timed in their place.

    python tools/bench_roles.py [--batches 1 4] [--size 16] [--rounds 15] [--device cuda] [--step]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from distill.adapters import Adapters, LoRA
from distill.call import Affine, Call
from distill.denoiser import BackboneDenoiser, Condition
from distill.guidance import Guided
from distill.methods.base import Batch
from distill.methods.dmd2 import DMD2
from distill.roles import Roles
from distill.schedule import from_scheduler
from distill.together import Question, Together


def networks(size: int, width: int, device: str, dtype: torch.dtype) -> Roles:
    """Teacher, student and critic on one shared UNet."""
    torch.manual_seed(0)
    backbone = UNet2DConditionModel(
        sample_size=size, block_out_channels=(width, 2 * width, 4 * width), layers_per_block=2, cross_attention_dim=256, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).to(device, dtype).eval()
    schedule, _ = from_scheduler(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    call = Call("sample", {"timestep": Affine()})
    adapters = Adapters(backbone, LoRA(16, 16), ["student", "critic"])

    def network(role: str | None) -> BackboneDenoiser:
        return BackboneDenoiser(backbone, schedule, "eps", call, adapters.use(role), adapters.named_parameters(role) if role else {})

    together = Together(BackboneDenoiser(backbone, schedule, "eps", call), adapters)
    return Roles(network(None), network("student"), network("critic"), together=together)


def timed(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--step", action="store_true")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    roles, method = networks(options.size, options.width, device, dtype), DMD2(guidance_scale=4.0, critic_steps=1)
    together, guided = roles.together, Guided(roles.teacher, 4.0)
    assert roles.critic is not None and together is not None
    for batch in options.batches:
        x, t = torch.randn(batch, 4, options.size, options.size, device=device), torch.full((batch,), 0.5, dtype=torch.float64, device=device)
        words = {"encoder_hidden_states": torch.randn(batch, 77, 256, device=device, dtype=dtype)}
        condition = Condition(words, {k: torch.zeros_like(v) for k, v in words.items()})

        @torch.no_grad()
        def two(x: Any = x, t: Any = t, condition: Any = condition) -> None:
            guided.predict(x, t, condition)
            roles.critic.predict(x, t, condition)  # type: ignore[union-attr]

        def one(x: Any = x, t: Any = t, condition: Any = condition) -> None:
            asked: Any = guided.asked(x, t, condition)
            together.ask([Question(None, *asked), Question("critic", x, t, condition)])

        def step(joined: bool, x: Any = x, condition: Any = condition) -> None:
            roles.together = together if joined else None
            for role, loss, _ in method.step(roles, Batch(x, condition)):
                loss.backward(inputs=roles.parameters(str(role)))

        pair: list[Callable[[], Any]] = [lambda f=step: f(False), lambda f=step: f(True)] if options.step else [two, one]
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(options.rounds + 2):
            for k in (0, 1) if i % 2 else (1, 0):
                seconds = timed(pair[k], device)
                if i >= 2:
                    times[k].append(seconds)
        ratios = sorted(b / a for a, b in zip(*times, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-(len(ratios) // 4) - 1]
        apart, joined = (1e3 * statistics.median(v) for v in times)
        print(f"batch {batch}: apart {apart:.1f} ms, together {joined:.1f} ms, ratio {statistics.median(ratios):.3f} (middle half {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
