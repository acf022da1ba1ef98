"""Roles: adapters on one shared backbone are as separate as copies, and cost a fraction of the memory."""

from typing import Any

import pytest
import torch
from tiny import perturb, tiny_stable_diffusion, tiny_unet2d

from distill.errors import UserError
from distill.roles import LoRA, average, build_roles
from distill.teacher import Teacher


def setting(pipeline: Any) -> tuple[Teacher, torch.Tensor, torch.Tensor, Any]:
    teacher = Teacher(pipeline)
    condition = teacher.condition([teacher.placeholder()] * 3)
    return teacher, torch.randn(3, *teacher.sample_shape), torch.full((3,), 0.7, dtype=torch.float64), condition


@pytest.mark.parametrize("make", [tiny_unet2d, tiny_stable_diffusion])
def test_adapters_off_is_the_teacher_and_fresh_adapters_change_nothing(make: Any) -> None:
    teacher, x, t, condition = setting(make())
    before = teacher.denoiser(x, t, condition)
    roles, adapters = build_roles(teacher, ["student", "critic"], LoRA(rank=4, alpha=8))
    assert adapters is not None and roles.critic is not None
    assert torch.equal(roles.teacher(x, t, condition), before)
    assert torch.equal(roles.student(x, t, condition), before)  # B = 0
    perturb(roles.parameters("student"))
    assert torch.equal(roles.teacher(x, t, condition), before) and torch.equal(roles.critic(x, t, condition), before)
    assert (roles.student(x, t, condition) - before).abs().max() > 1e-3
    assert torch.equal(teacher.denoiser(x, t, condition), before)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=4)])
def test_gradients_stay_in_their_role(lora: LoRA | None) -> None:
    teacher, x, t, condition = setting(tiny_unet2d())
    roles, _ = build_roles(teacher, ["student", "critic"], lora)
    assert roles.critic is not None
    perturb(roles.parameters("student"))
    perturb(roles.parameters("critic"))
    student, critic = roles.parameters("student"), roles.parameters("critic")
    assert not {id(p) for p in student} & {id(p) for p in critic}
    # A loss that runs through both networks, as the GAN's does.
    loss = roles.critic(roles.student(x, t, condition), t, condition).square().mean()
    loss.backward(inputs=student)
    assert all(p.grad is not None and p.grad.any() for p in student) and all(p.grad is None for p in critic)
    assert all(p.grad is None for n, p in teacher.backbone.named_parameters() if "lora" not in n)


def test_the_shared_backbone_costs_less_than_half_of_three_copies() -> None:
    def memory(lora: LoRA | None) -> int:
        roles, _ = build_roles(Teacher(tiny_stable_diffusion()), ["student", "critic"], lora)
        networks = {id(n.backbone): n.backbone for n in (roles.teacher, roles.student, roles.critic)}  # type: ignore[union-attr]
        return sum(p.numel() for b in networks.values() for p in b.parameters())

    assert memory(LoRA(rank=1, alpha=1)) <= 0.5 * memory(None)


@pytest.mark.parametrize("make", [tiny_unet2d, tiny_stable_diffusion])
def test_a_critic_alone_may_be_an_adapter_on_the_teacher(make: Any) -> None:
    """VSD's roles: a student with weights of its own, and the critic as "adapters on"."""
    teacher, x, t, condition = setting(make())
    before = teacher.denoiser(x, t, condition)
    roles, adapters = build_roles(teacher, ["student", "critic"], critic_lora=LoRA(rank=4, alpha=8))
    assert adapters is not None and roles.critic is not None
    assert torch.equal(roles.critic(x, t, condition), before) and torch.equal(roles.student(x, t, condition), before)
    perturb(roles.parameters("critic"))
    assert torch.equal(roles.teacher(x, t, condition), before) and torch.equal(roles.student(x, t, condition), before)
    assert (roles.critic(x, t, condition) - before).abs().max() > 1e-3
    student: Any = roles.student
    assert not any("lora" in name for name, _ in student.backbone.named_parameters())
    assert sum(p.numel() for p in roles.parameters("student")) == sum(p.numel() for p in student.backbone.parameters())
    loss = roles.critic(roles.student(x, t, condition), t, condition).square().mean()
    loss.backward(inputs=roles.parameters("student"))
    assert all(p.grad is None for p in teacher.backbone.parameters())


def test_layers_are_chosen_by_name() -> None:
    teacher = Teacher(tiny_stable_diffusion())
    roles, adapters = build_roles(teacher, ["student"], LoRA(4, 4, ("to_q", "to_v")))
    assert adapters is not None and all(n.endswith(("to_q", "to_v")) for n in adapters.targets) and len(adapters.targets) >= 8
    assert len(roles.parameters("student")) == 2 * len(adapters.targets)
    with pytest.raises(UserError, match="no layer of UNet2DConditionModel is named 'to_x'"):
        build_roles(Teacher(tiny_stable_diffusion()), ["student"], LoRA(4, 4, ("to_x",)))


def test_a_guidance_embedding_starts_without_effect() -> None:
    teacher, x, t, condition = setting(tiny_stable_diffusion())
    roles, _ = build_roles(teacher, ["student", "target"], guidance_embedding=32)
    for w in (1.0, 5.0):
        torch.testing.assert_close(roles.student(x, t, condition.with_guidance(torch.full((3,), w))), teacher.denoiser(x, t, condition))
    perturb(roles.parameters("student"))
    low, high = (roles.student(x, t, condition.with_guidance(torch.full((3,), w))) for w in (1.0, 5.0))
    assert (low - high).abs().max() > 1e-4
    with pytest.raises(UserError, match="no room for a guidance embedding"):
        build_roles(Teacher(tiny_unet2d()), ["student"], guidance_embedding=32)
    with pytest.raises(UserError, match="LoRA student cannot"):
        build_roles(Teacher(tiny_stable_diffusion()), ["student"], LoRA(4, 4), guidance_embedding=32)


def test_average() -> None:
    target, source = [torch.zeros(2)], [torch.ones(2)]
    average(target, source, 0.75)
    assert torch.equal(target[0], torch.full((2,), 0.25))
