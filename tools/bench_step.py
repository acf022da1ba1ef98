"""What the toolkit's loop costs: a recipe's training step against the same networks stepped in a bare PyTorch loop.

The bare loop is DMD2 written out by hand for one family of networks: no denoisers, conditions, schedules, schemas,
generators, logs or accelerate; noise levels come from a table in float32. Both loops run in alternation on the same
machine, and the ratio of the medians is printed with its spread: machines are noisy, ratios less so. With ``--memory``
the parameter memory of a LoRA run on the shared backbone is compared with three full copies.

    python tools/bench_step.py [--recipe quickstart] [--rounds 15] [--steps 4] [--memory]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config import load_config
from distill.denoiser import BackboneDenoiser
from distill.methods.dmd2 import DMD2
from distill.trainer import Trainer


def bare_step(trainer: Trainer) -> Callable[[int], None]:
    """DMD2's step on the trainer's own networks and optimizers, by hand: one-step student, v-prediction."""
    method, roles, config = trainer.method, trainer.roles, trainer.config
    assert isinstance(method, DMD2) and method.steps == 1 and method.divergence == "reverse_kl" and method.guidance_scale == 1
    networks = [roles.teacher, roles.student, roles.critic]
    assert all(isinstance(n, BackboneDenoiser) and n.kind == "v" for n in networks)
    teacher, student, critic = (n.backbone for n in networks if isinstance(n, BackboneDenoiser))
    ladder = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alphas, sigmas = (c.float() for c in roles.schedule.alpha_sigma(ladder))
    optimizers = {role: torch.optim.AdamW(p, 1e-6, fused=True) for role, p in trainer.parameters.items()}
    size, gan = config.trainer.batch_size, method.gan
    caught: dict[str, Tensor] = {}
    watched = (critic if gan is not None and gan.features == "critic" else teacher) if gan else None

    class Enough(Exception):
        pass

    def judge(x: Tensor, labels: Tensor) -> Tensor:
        """Logits from the hidden features, the rest of the network left out: as lean as a person would write it."""
        assert gan is not None and watched is not None and roles.discriminator is not None
        k, alpha, sigma = levels(*gan.times)
        k, alpha, sigma = (c.repeat(len(x) // size, *[1] * (c.dim() - 1)) for c in (k, alpha, sigma))

        def catch(name: str) -> Callable[..., None]:
            def hook(module: object, arguments: object, out: object) -> None:
                caught[name] = out[0] if isinstance(out, tuple) else out  # type: ignore[assignment]
                if len(caught) == len(gan.layers):
                    raise Enough

            return hook

        caught.clear()
        hooks = [watched.get_submodule(name).register_forward_hook(catch(name)) for name in gan.layers]
        try:
            watched(alpha * x + sigma * torch.randn_like(x), k, class_labels=labels, return_dict=False)
        except Enough:
            pass
        for hook in hooks:
            hook.remove()
        return roles.discriminator(caught)

    def levels(low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        k = (torch.rand(size) * (high - low) + low).mul(999).long()
        return k, alphas[k].reshape(-1, 1, 1, 1), sigmas[k].reshape(-1, 1, 1, 1)

    def generate(noise: Tensor, labels: Tensor) -> Tensor:
        return -student(noise, torch.full((size,), 999.0), class_labels=labels, return_dict=False)[0]

    def update(role: str, loss: Tensor) -> None:
        parameters = trainer.parameters[role]
        loss.backward(inputs=parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizers[role].step()
        optimizers[role].zero_grad(set_to_none=True)

    def step(index: int) -> None:
        x0, condition = trainer.data.batch(index, size)
        labels = condition.values["class_labels"]
        noise = torch.randn(size, *trainer.parts.teacher.sample_shape)
        x = generate(noise, labels)
        k, alpha, sigma = levels(*method.score_times)
        x_t = alpha * x.detach() + sigma * torch.randn_like(x)
        with torch.no_grad():
            real = alpha * x_t - sigma * teacher(x_t, k, class_labels=labels, return_dict=False)[0]
            fake = alpha * x_t - sigma * critic(x_t, k, class_labels=labels, return_dict=False)[0]
            g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5)
        loss = method.score_weight * 0.5 * (x - (x - g).detach()).square().mean()
        if gan is not None:
            loss = loss + gan.weight * F.softplus(-judge(x, labels)).mean()
        update("student", loss)
        if trainer.ema:
            torch._foreach_lerp_(list(trainer.ema.values()), trainer.parameters["student"], 1e-3)
        for _ in range(method.critic_steps):
            with torch.no_grad():
                x = generate(torch.randn_like(noise), labels)
            k, alpha, sigma = levels(*method.critic_times)
            eps = torch.randn_like(x)
            prediction = critic(alpha * x + sigma * eps, k, class_labels=labels, return_dict=False)[0]
            loss = (prediction - (alpha * eps - sigma * x)).square().mean()
            if gan is None:
                update("critic", loss)
                continue
            if gan.features == "teacher":
                update("critic", loss)
            fake_logits, real_logits = judge(torch.cat([x, x0]), torch.cat([labels, labels])).chunk(2)
            adversarial = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
            if gan.features == "critic":
                joint = trainer.parameters["critic"] + trainer.parameters["discriminator"]
                (loss + gan.discriminator_weight * adversarial).backward(inputs=joint)
                for role in ("critic", "discriminator"):
                    torch.nn.utils.clip_grad_norm_(trainer.parameters[role], 10.0)
                    optimizers[role].step()
                    optimizers[role].zero_grad(set_to_none=True)
            else:
                update("discriminator", adversarial)

    return step


def seconds(step: Callable[[int], object], first: int, count: int) -> float:
    start = time.perf_counter()
    for index in range(first, first + count):
        step(index)
    return (time.perf_counter() - start) / count


def compare_time(recipe: str, rounds: int, count: int) -> float:
    """Median over rounds of (product step) / (bare step), measured in alternation."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_config(recipe, [f"output.folder={folder}/run"]), Path(folder) / "run")
        bare = bare_step(trainer)
        seconds(trainer.step, 0, 2)
        seconds(bare, 0, 2)
        ratios, ours, theirs = [], [], []
        for i in range(rounds):
            pair = [(trainer.step, ours), (bare, theirs)]
            for step, times in pair if i % 2 == 0 else pair[::-1]:
                times.append(seconds(step, i * count, count))
            ratios.append(ours[-1] / theirs[-1])
    ratio = statistics.median(ratios)
    low, high = sorted(ratios)[len(ratios) // 4], sorted(ratios)[-(len(ratios) // 4) - 1]
    print(f"toolkit {1e3 * statistics.median(ours):.1f} ms, bare loop {1e3 * statistics.median(theirs):.1f} ms per step")
    print(f"ratio {ratio:.3f} (middle half {low:.3f} to {high:.3f}, {rounds} rounds of {count} steps in alternation)")
    return ratio


def compare_memory(recipe: str, rank: int) -> float:
    """Parameter bytes of a LoRA run on the shared backbone over those of teacher, student and critic as full copies."""

    def parameter_bytes(overrides: list[str]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(load_config(recipe, [*overrides, f"output.folder={folder}/run"]), Path(folder) / "run")
        networks = (trainer.roles.teacher, trainer.roles.student, trainer.roles.critic)
        backbones = {id(n.backbone): n.backbone for n in networks if isinstance(n, BackboneDenoiser)}.values()
        parameters = {id(p): p for b in backbones for p in b.parameters()}.values()
        return sum(p.numel() * p.element_size() for p in parameters)

    full = parameter_bytes([])
    shared = parameter_bytes(["student.weights=lora", f"student.lora={{rank: {rank}}}"])
    print(f"parameters: three copies {full / 1e6:.2f} MB, shared backbone with two rank-{rank} adapters {shared / 1e6:.2f} MB, ratio {shared / full:.3f}")
    return shared / full


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rank", type=int, default=4)
    options = parser.parse_args()
    if options.memory:
        compare_memory(options.recipe, options.rank)
    else:
        compare_time(options.recipe, options.rounds, options.steps)
