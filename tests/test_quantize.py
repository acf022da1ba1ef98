"""A frozen teacher in 8 or 4 bits. bitsandbytes also runs on CPUs; without it only the refusals are tested."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import perturb, tiny_stable_diffusion
from torch import nn

from distill import checkpoint, quantize
from distill.adapters import LoRA, inside_a_block
from distill.errors import UserError
from distill.roles import build_roles
from distill.teacher import Teacher

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
CPU = torch.device("cpu")


def inputs(teacher: Teacher) -> tuple[Any, ...]:
    x = torch.randn(3, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor(0.7), teacher.condition(["a red apple", "a car", "a cat"])


@installed
@pytest.mark.parametrize(("bits", "size", "error"), [("8bit", 1, 0.01), ("4bit", 0.5, 0.1)])
def test_a_quantised_teacher_is_close_and_small(bits: Any, size: float, error: float) -> None:
    teacher = Teacher(tiny_stable_diffusion())
    x, t, condition = inputs(teacher)
    before = teacher.denoiser(x, t, condition)
    layers = {n: m.weight.numel() for n, m in teacher.backbone.named_modules() if type(m) is nn.Linear and inside_a_block(n)}
    others = {n: p.clone() for n, p in teacher.backbone.named_parameters() if n.removesuffix(".weight") not in layers}
    quantize.quantize(teacher.backbone, bits, CPU)
    after = teacher.denoiser(x, t, condition)
    assert 0 < (after - before).norm() / before.norm() < error
    for name, numbers in layers.items():
        weight = teacher.backbone.get_parameter(f"{name}.weight")
        assert weight.numel() * weight.element_size() == pytest.approx(size * numbers, rel=0.2, abs=64) and not weight.requires_grad
    assert all(torch.equal(p, others[n]) for n, p in teacher.backbone.named_parameters() if n in others) and len(layers) > 10
    sample = x.clone().requires_grad_()
    teacher.denoiser(sample, t, condition).square().mean().backward()
    assert sample.grad is not None and sample.grad.abs().max() > 0
    assert teacher.denoiser.dtype == torch.float32


@installed
@pytest.mark.parametrize(("bits", "dora"), [("8bit", False), ("4bit", False), ("4bit", True)])
def test_adapters_on_a_quantised_backbone(bits: Any, dora: bool) -> None:
    teacher = Teacher(tiny_stable_diffusion())
    x, t, condition = inputs(teacher)
    quantize.quantize(teacher.backbone, bits, CPU)
    before = teacher.denoiser(x, t, condition)
    roles, adapters = build_roles(teacher, ["student", "critic"], LoRA(2, 2, dora=dora))
    assert adapters is not None and roles.critic is not None
    assert torch.equal(roles.student(x, t, condition), before) and torch.equal(roles.teacher(x, t, condition), before)
    perturb(roles.parameters("student"))
    roles.student(x, t, condition).square().mean().backward(inputs=roles.parameters("student"))
    assert all(p.grad is not None and p.grad.any() for p in roles.parameters("student"))
    assert torch.equal(roles.critic(x, t, condition), before)
    quantised = [n for n in adapters.targets if not adapters.backbone.get_submodule(n).get_base_layer().weight.is_floating_point()]  # type: ignore[operator]
    assert len(quantised) > 10


@installed
def test_a_run_on_a_quantised_teacher_exports_the_whole_one(tmp_path: Path) -> None:
    """Two steps of consistency distillation with LoRA; the exported student has the teacher's own weights and the adapter."""
    from distill.cli import main
    from distill.run import load_student

    tiny_stable_diffusion().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red apple\na blue car\na cat\na photograph\n")
    (tmp_path / "recipe.yaml").write_text(f"""\
teacher: {{pipeline: {tmp_path}/teacher, quantize: 4bit}}
student: {{weights: lora, lora: {{rank: 2}}, ema: 0.5}}
method: {{name: dmd2, critic_steps: 1}}
data: {{source: prompts, path: {tmp_path}/prompts.txt}}
trainer: {{steps: 2, batch_size: 2, sample_every: 0, device: cpu, gradient_checkpointing: true}}
output: {{folder: {tmp_path}/run}}
""")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    student, _ = load_student(tmp_path / "run")
    assert student.adapters is not None and all(p.is_floating_point() for p in student.denoiser.backbone.parameters())
    from diffusers import StableDiffusionPipeline

    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    assert all(p.is_floating_point() for p in exported.unet.parameters())
    tensors, _ = checkpoint.load(tmp_path / "run" / "checkpoints", 2)
    assert any(n.startswith("ema/") for n in tensors) and all("lora_" in n for n in tensors if n.startswith(("student/", "critic/", "ema/")))


@installed
def test_eight_bit_adam_counts_on_after_a_resume(tmp_path: Path) -> None:
    from distill.config import Optimizer
    from distill.optim import build_optimizer

    def run(steps: range, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    start = torch.randn(128, 64, generator=torch.Generator().manual_seed(9))
    whole, first, second = (nn.Parameter(start.clone()) for _ in range(3))
    settings = Optimizer(name="adamw8bit", lr=1e-2)
    run(range(4), whole, build_optimizer(settings, [whole]))
    early = build_optimizer(settings, [first])
    run(range(2), first, early)
    checkpoint.save(tmp_path, 2, {"p": first} | checkpoint.optimizer_tensors(early, "optimizer.student"), {}, 1)
    tensors, _ = checkpoint.load(tmp_path, 2)
    assert any(t.dtype == torch.uint8 for t in tensors.values())
    with torch.no_grad():
        second.copy_(tensors["p"])
    late = build_optimizer(settings, [second])
    checkpoint.restore_optimizer(late, tensors, "optimizer.student")
    run(range(2, 4), second, late)
    assert torch.equal(second, whole) and not torch.equal(first, whole)


torchao_installed = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@torchao_installed
@pytest.mark.parametrize(("bits", "error"), [("int8", 0.02), ("float8", 0.06)])
def test_torchao_quantises_the_same_layers(bits: Any, error: float) -> None:
    teacher = Teacher(tiny_stable_diffusion())
    x, t, condition = inputs(teacher)
    before = teacher.denoiser(x, t, condition)
    layers = {n for n, m in teacher.backbone.named_modules() if type(m) is nn.Linear and inside_a_block(n)}
    quantize.quantize(teacher.backbone, bits, CPU)
    after = teacher.denoiser(x, t, condition)
    assert 0 < (after - before).norm() / before.norm() < error
    changed = {n.removesuffix(".weight") for n, p in teacher.backbone.named_parameters() if type(p) not in (nn.Parameter, torch.Tensor)}
    assert changed == layers and len(layers) > 10
    sample = x.clone().requires_grad_()
    teacher.denoiser(sample, t, condition).square().mean().backward()
    assert sample.grad is not None and sample.grad.abs().max() > 0 and teacher.denoiser.dtype == torch.float32
    roles, adapters = build_roles(teacher, ["student", "critic"], LoRA(2, 2))
    assert adapters is not None and torch.equal(roles.student(x, t, condition), after) and torch.equal(roles.teacher(x, t, condition), after)
    perturb(roles.parameters("student"))
    roles.student(x, t, condition).square().mean().backward(inputs=roles.parameters("student"))
    assert all(p.grad is not None and p.grad.any() for p in roles.parameters("student"))


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from distill.config import load_config

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"teacher.quantize: needs torchao, which is not installed: pip install 'distill-diffusion\[torchao\]'"):
        load_config("quickstart", ["teacher.quantize=int8", f"output.folder={tmp_path}"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert load_config("quickstart", ["teacher.quantize=float8", f"output.folder={tmp_path}"]).teacher.quantize == "float8"
    with pytest.raises(UserError, match="DoRA does not work on int8 layers"):
        load_config("quickstart", ["teacher.quantize=int8", "student={weights: lora, lora: {dora: true}}", f"output.folder={tmp_path}"])


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes, which is not installed: pip install 'distill-diffusion\[quantization\]'"):
        quantize.quantize(nn.Linear(2, 2), "8bit", CPU)


@installed
def test_backbones_without_linear_layers_are_refused() -> None:
    with pytest.raises(UserError, match="Conv2d has no linear layer inside its blocks"):
        quantize.quantize(nn.Conv2d(1, 1, 1), "4bit", CPU)
