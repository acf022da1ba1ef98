"""Students that are told where a jump ends: they start as the teacher, train, resume, and come back from an export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from test_jvp import BACKBONES, build
from tiny import perturb, tiny_dit, tiny_stable_diffusion, tiny_unet2d
from torch import Tensor, nn

from distill.adapters import LoRA
from distill.denoiser import BackboneDenoiser, Condition
from distill.errors import UserError
from distill.export import export_diffusers, export_few_step, export_lora
from distill.loading import load_pipeline
from distill.memory import checkpoint_activations
from distill.roles import Roles, build_roles
from distill.sampling import Sampler, renoise_sample, uniform_ladder
from distill.student import Student
from distill.teacher import Teacher
from distill.two_time import time_modules

PLACES = {
    "unet2d v": ["time_embedding"], "unet2d eps": ["time_embedding"], "stable diffusion eps": ["time_embedding"], "stable diffusion v": ["time_embedding"],
    "sd3": ["time_text_embed.timestep_embedder"], "flux": ["time_text_embed.timestep_embedder"],
    "dit": [f"transformer_blocks.{i}.norm1.emb.timestep_embedder" for i in range(2)],
}


def question(teacher: Teacher) -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(0)
    return torch.randn(2, *teacher.sample_shape), torch.tensor([0.6, 0.9], dtype=torch.float64), teacher.condition([teacher.placeholder()] * 2)


def ends(roles: Roles, role: str = "student") -> list[nn.Parameter]:
    return [p for n, p in roles.named_parameters(role).items() if n.startswith("end_time.")]


@torch.no_grad()
@pytest.mark.parametrize("lora", [None, LoRA(2, 2.0)])
@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_starts_as_the_teacher_and_learns_where_to_end(name: str, lora: LoRA | None) -> None:
    teacher = build(name)
    found = time_modules(teacher, teacher.denoiser)
    assert [n.replace("time_text_embed.text_embedder", "") for n in found] == PLACES[name]
    x, t, told = question(teacher)
    s = torch.tensor([0.3, 0.0], dtype=torch.float64)
    before = teacher.denoiser(x, t, told)
    roles, _ = build_roles(teacher, ["student", "critic"], lora, end_time=True)
    assert torch.equal(roles.student(x, t, told), before) and torch.equal(roles.student(x, t, told.ending(s)), before)
    assert ends(roles) and not ends(roles, "critic")
    perturb(ends(roles), 0.3)
    moved = roles.student(x, t, told.ending(s))
    assert (moved - before).abs().max() > 1e-3 and (moved - roles.student(x, t, told.ending(s.flip(0)))).abs().max() > 1e-4
    assert torch.equal(teacher.denoiser(x, t, told.ending(s)), before)  # takes no notice
    assert roles.critic is not None and torch.equal(roles.critic(x, t, told.ending(s)), before)
    # Each sample is told its own end, and one without an end is at s = t.
    assert torch.allclose(roles.student(x[:1], t[:1], told[:1].ending(s[:1])), moved[:1], rtol=1e-4, atol=1e-3)
    assert torch.equal(roles.student(x, t, told), roles.student(x, t, told.ending(t)))


def test_a_backbone_without_an_embedding_of_the_time_is_refused() -> None:
    teacher = Teacher(tiny_unet2d())

    with torch.no_grad():
        for p in teacher.backbone.time_embedding.parameters():  # type: ignore[union-attr]
            p.zero_()
    with pytest.raises(UserError, match="UNet2DModel has no embedding of the time alone"):
        build_roles(teacher, ["student"], end_time=True)


@pytest.mark.parametrize("make", [tiny_unet2d, tiny_dit])
@pytest.mark.parametrize("lora", [None, LoRA(2, 2.0)])
def test_gradients_are_the_same_under_checkpointing(make: Any, lora: LoRA | None) -> None:
    """Of a DiT the embeddings lie inside the blocks that are computed again."""
    found = []
    for checkpointed in (False, True):
        teacher = Teacher(make())
        with torch.no_grad():
            perturb(teacher.backbone.parameters(), 0.05)
        roles, adapters = build_roles(teacher, ["student"], lora, end_time=True)
        perturb(roles.parameters("student"), 0.05)
        student = roles.student
        assert isinstance(student, BackboneDenoiser)
        if checkpointed:
            checkpoint_activations(student.backbone, adapters, student.end_time)
        x, t, told = question(teacher)
        student(x, t, told.ending(t / 3)).square().mean().backward()
        found.append({n: p.grad for n, p in student.named_parameters().items()})
    for n, gradient in found[0].items():
        assert gradient is not None and found[1][n] is not None
        torch.testing.assert_close(found[1][n], gradient, rtol=1e-4, atol=1e-6)
    assert all(found[0][n].abs().max() > 0 for n in found[0] if n.startswith("end_time."))  # type: ignore[union-attr]


def two_time_student(pipeline: Any, lora: LoRA | None = None, gamma: float = 0.0) -> Student:
    teacher = Teacher(pipeline)
    roles, adapters = build_roles(teacher, ["student"], lora, end_time=True)
    perturb(roles.parameters("student"), 0.02)
    perturb(ends(roles), 0.2)
    return Student(teacher, roles.student, Sampler(uniform_ladder(4), 2, gamma=gamma, end_time=True), adapters)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [None, LoRA(2, 2.0)])
@pytest.mark.parametrize(("make", "gamma"), [(tiny_unet2d, 0.0), (tiny_stable_diffusion, 0.5), (tiny_dit, 1.0)])
def test_exports_tell_each_step_where_it_ends(tmp_path: Path, make: Any, gamma: float, lora: LoRA | None) -> None:
    """The export proves itself in 1 to 4 steps; loaded again, as a user does, it makes the same images, and others without the embedding."""
    student = two_time_student(make(), lora, gamma)
    export_few_step(student, tmp_path / "out", method="mean_flow", teacher_name="owner/teacher")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", custom_pipeline="pipeline", trust_remote_code=True)
    inputs = {"prompt": ["a cat"] * 2} if make is tiny_stable_diffusion else {"class_labels": [1, 2]}
    if make is tiny_stable_diffusion:
        return  # no generator order to compare: proven at export
    kwargs = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}

    def images(pipe: Any) -> Tensor:
        return torch.as_tensor(pipe(**inputs, **(kwargs | {"generator": torch.Generator().manual_seed(0)})).images)

    first = images(loaded)
    assert torch.equal(images(load_pipeline(tmp_path / "out")), first)
    loaded.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", custom_pipeline="pipeline", trust_remote_code=True)
    assert (images(again) - first).abs().max() < 1e-6
    with torch.no_grad():
        loaded.end_time.out.weight.zero_()
        loaded.end_time.out.bias.zero_()
    assert (images(loaded) - first).abs().max() > 1e-3
    for export in (export_diffusers, *((export_lora,) if lora else ())):
        with pytest.raises(UserError, match="use --to few-step"):
            export(student, tmp_path / "stock", method="mean_flow", teacher_name="owner/teacher")  # type: ignore[operator]




def test_samplers_tell_the_way_points() -> None:
    student, seen = two_time_student(tiny_unet2d()), []
    predict = student.denoiser.predict

    def noted(x: Tensor, t: Tensor, condition: Condition, features: Any = ()) -> Any:
        assert condition.end is not None
        seen.append((round(float(t[0]), 6), round(float(condition.end[0]), 6)))
        return predict(x, t, condition, features)

    student.denoiser.predict = noted  # type: ignore[assignment,method-assign]
    noise, told = torch.randn(1, *student.teacher.sample_shape), student.teacher.condition([1])
    with torch.no_grad():
        renoise_sample(student.denoiser, (1.0, 0.5), noise, told, gamma=0.0, end_time=True)
        renoise_sample(student.denoiser, (1.0, 0.5), noise, told, gamma=1.0, end_time=True)
        renoise_sample(student.denoiser, (1.0, 0.5), noise, told, gamma=0.5, end_time=True)
    assert seen[:4] == [(1.0, 0.5), (0.5, 0.0), (1.0, 0.0), (0.5, 0.0)]
    assert seen[4:] == [(1.0, 0.25), (0.5, 0.0)]
