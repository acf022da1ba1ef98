"""What is trained is kept in float32, whatever the teacher's dtype: small steps add up, and the network computes as the teacher does."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill import checkpoint
from distill.adapters import LoRA
from distill.cli import main
from distill.config import Config, Optimizer, load_config
from distill.denoiser import BackboneDenoiser, Condition
from distill.errors import UserError
from distill.masters import Masters
from distill.memory import checkpoint_activations
from distill.optim import build_optimizer
from distill.plan import make_plan
from distill.roles import Roles, build_roles
from distill.run import load_student, mixed_precision
from distill.selection import Selection
from distill.teacher import Teacher

STEPS, LR = 50, 1e-5


def half(make: Any = tiny.tiny_unet2d, **kind: Any) -> tuple[Teacher, Roles, Tensor, Tensor, Condition]:
    pipeline = make()
    for network in (c for c in pipeline.components.values() if isinstance(c, nn.Module)):
        nn.Module.to(network, torch.bfloat16)
    teacher = Teacher(pipeline, {"max_sequence_length": 16} if make is tiny.tiny_flux else None)
    roles, _ = build_roles(teacher, ["student", "critic", "target"], **kind)
    x = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    return teacher, roles, x, torch.tensor(0.6), teacher.condition([teacher.placeholder()] * 2)


@pytest.mark.parametrize("kind", [{}, {"lora": LoRA(2, 2)}, {"lora": LoRA(2, 2, dora=True)}, {"selection": Selection(("mid_block",))}])
def test_small_steps_add_up(kind: dict[str, Any]) -> None:
    """A weight of 1 under a constant gradient: each step of SGD moves it by lr, and so does each of Adam, whose mean gradient
    over its root mean square is 1. After N steps it is 1 − N·lr. In bfloat16 1 − 1e-5 is 1 again, and it never moves."""
    _, roles, *_ = half(**kind)
    for role, name in itertools.product(("student", "critic"), ("sgd", "adamw")):
        weight = roles.parameters(role)[0]
        narrow = nn.Parameter(torch.ones_like(weight, dtype=torch.bfloat16))
        with torch.no_grad():
            weight.fill_(1.0)
        settings = Optimizer(name=name, lr=LR, betas=(0.0, 0.999), weight_decay=0.0)
        for parameter in (weight, narrow):
            optimizer = build_optimizer(settings, [parameter])
            for _ in range(STEPS):
                parameter.grad = torch.ones_like(parameter)
                optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full(weight.shape, 1 - STEPS * LR), rtol=0, atol=5e-6)
        assert torch.equal(narrow.detach(), torch.ones_like(narrow))


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("make", [tiny.tiny_unet2d, tiny.tiny_stable_diffusion, tiny.tiny_sd3, tiny.tiny_flux, tiny.tiny_dit])
def test_a_fresh_student_computes_exactly_as_its_teacher(make: Any, selected: bool) -> None:
    kind = {"selection": Selection(("re:.*(norm|attn).*",))} if selected else {}
    teacher, roles, x, t, condition = half(make, **kind)
    student = roles.student
    assert isinstance(student, BackboneDenoiser) and student.dtype == torch.bfloat16
    before = teacher.denoiser(x, t, condition)

    def gradients() -> list[Tensor]:
        out = student(x, t, condition)
        assert torch.equal(out, before)
        return list(torch.autograd.grad(out.square().mean(), roles.parameters("student")))

    plain = gradients()
    assert all(g.dtype == torch.float32 and g.any() for g in plain[:3])
    checkpoint_activations(student.backbone, student.masters)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert all(p.dtype == torch.float32 and p is q for p, q in zip(roles.parameters("student"), student.named_parameters().values(), strict=True))
    shared = {id(p) for p in teacher.backbone.parameters()}
    own = {id(p) for p in roles.parameters("student")}
    assert all(id(p) in (own if p.dtype == torch.float32 else shared) for p in student.backbone.parameters())


def test_weights_are_back_after_a_forward_that_ends_early() -> None:
    _, roles, x, t, condition = half()
    student = roles.student
    assert isinstance(student, BackboneDenoiser)
    student.features(x, t, condition, ("mid_block",))
    with pytest.raises(Exception):  # noqa: B017 - whatever a network says to a wrong shape
        student(x[:, :0], t, condition)
    assert all(p.dtype == torch.float32 and isinstance(p, nn.Parameter) for p in student.backbone.parameters())


def test_tied_weights_stay_tied() -> None:
    a, b = nn.Linear(4, 4, bias=False).bfloat16(), nn.Linear(4, 4, bias=False).bfloat16()
    b.weight = a.weight
    network = nn.Sequential(a, b)
    masters = Masters(network, network.parameters())
    with masters.using():
        assert a.weight is b.weight and a.weight.dtype == torch.bfloat16
        network(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert a.weight is b.weight and a.weight.dtype == torch.float32 and a.weight.grad is not None and a.weight.grad.dtype == torch.float32
    copied = masters.narrow_copy(network)
    assert copied[0].weight is copied[1].weight and copied[0].weight.dtype == torch.bfloat16  # type: ignore[index]
    assert not Masters(nn.Linear(2, 2), [])


RECIPE = """\
teacher: {{pipeline: {folder}/teacher, dtype: bfloat16}}
student: {{ema: 0.9}}
method: {{name: {method}}}
data: {{source: images, path: {folder}/images}}
optimizers: {{student: {{lr: 1e-6, weight_decay: 0.0}}}}
trainer: {{steps: {steps}, batch_size: 2, sample_every: 0, log_every: 1, device: cpu, gradient_checkpointing: true}}
output: {{folder: {folder}/run}}
"""


def write(folder: Path, method: str, steps: int = 3) -> Path:
    from PIL import Image

    tiny.tiny_stable_diffusion().save_pretrained(folder / "teacher")
    (folder / "images").mkdir(exist_ok=True)
    for i, name in enumerate(("a cat", "a red car")):
        Image.new("RGB", (16, 16), (80 * i, 40, 90)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(name)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, method=method, steps=steps))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("method", ["dmd2", "consistency"])
def test_a_run_in_bfloat16_trains_in_float32_and_exports_bfloat16(tmp_path: Path, method: str) -> None:
    """With steps of 1e-6, which bfloat16 would lose: nearly every weight moves, by about three steps. The exported network is the
    trained one rounded once."""
    assert main(["train", str(write(tmp_path, method))]) == 0
    tensors, _ = checkpoint.load(tmp_path / "run" / "checkpoints", 3)
    before = load_file(tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = torch.cat([(tensors[f"student/{k}"] - v.bfloat16().float()).abs().flatten() for k, v in before.items()])
    assert 0.5e-6 < moved.median() < 4e-6 and (moved > 0).float().mean() > 0.8
    assert all(v.dtype == torch.float32 for k, v in tensors.items() if not k.endswith(".step"))
    exported = load_file(tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == before.keys()
    assert all(torch.equal(v, tensors[f"ema/{k}"].bfloat16()) for k, v in exported.items())
    student, _ = load_student(tmp_path / "run")
    assert student.denoiser.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in student.denoiser.parameters())


def test_a_plan_counts_float32_weights_and_their_casts(tmp_path: Path) -> None:
    tiny.tiny_stable_diffusion().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    text = RECIPE.format(folder=tmp_path, method="dmd2", steps=1).replace("images", "prompts").replace("/prompts}", "/prompts.txt}")
    (tmp_path / "recipe.yaml").write_text(text)
    plan = make_plan(load_config(tmp_path / "recipe.yaml"), "cpu")
    count = plan.parameters["student"]["trained"]
    assert plan.memory["teacher weights"] == 2 * plan.parameters["teacher"]["parameters"] == plan.disk["export"] == 2 * count
    assert plan.memory["student weights"] == plan.memory["critic weights"] == plan.memory["averaged weights"] == 4 * count
    assert plan.memory["optimizer states"] == 2 * 2 * 4 * count
    frozen = make_plan(load_config(tmp_path / "recipe.yaml", ["student.train=[mid_block]"]), "cpu")
    assert frozen.memory["student weights"] == 4 * frozen.parameters["student"]["trained"] < plan.memory["student weights"]


def test_float16_comes_with_a_loss_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def config(*settings: str) -> Config:
        return load_config("quickstart", [f"output.folder={tmp_path}", *settings])

    assert [mixed_precision(config(*s)) for s in ((), ("teacher.dtype=float16",), ("trainer.mixed_precision=bf16",))] == ["no", "fp16", "bf16"]
    with pytest.raises(UserError, match="trainer.mixed_precision: bf16 does not go with a float16 teacher"):
        config("teacher.dtype=float16", "trainer.mixed_precision=bf16")
