"""Nothing is left on the CPU by mistake: training steps and samples with every network on another device (see other_device.py)."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from other_device import ELSEWHERE, MixedDevices, There, elsewhere
from torch import nn

from distill.adapters import LoRA
from distill.config import Optimizer
from distill.methods.base import Batch, Method
from distill.methods.consistency import Consistency
from distill.methods.dmd2 import DMD2
from distill.optim import build_optimizer
from distill.roles import build_roles
from distill.run import _discriminator
from distill.student import Student
from distill.teacher import Teacher


def test_the_other_device_behaves_as_one() -> None:
    with elsewhere() as device:
        a, b = torch.randn(3, 4, device=device), torch.randn(3, 4)
        assert a.device == ELSEWHERE and isinstance(a, There) and b.device.type == "cpu"
        own = torch.Generator()
        for mix in (lambda: a + b, lambda: torch.cat([a, b]), lambda: torch.where(a > 0, a, b), lambda: torch.randn(2, device=device, generator=own)):
            with pytest.raises(MixedDevices):
                mix()
        assert torch.equal((a + b.to(device)).cpu(), a.cpu() + b) and (a * torch.tensor(2.0))[torch.tensor([0, 1])].device == ELSEWHERE
        layer = nn.Linear(4, 2).to(device)
        layer(a).sum().backward()
        torch.testing.assert_close(layer.weight.grad.cpu(), a.cpu().sum(0).expand(2, -1))  # type: ignore[union-attr]


DMD: dict[str, Any] = {"critic_steps": 1, "guidance_scale": 3.0}
GAN = {"weight": 1.0, "features": "teacher", "layers": ["mid_block"], "r1": 1.0}
CASES = [
    (tiny.tiny_unet2d, DMD2(steps=2, divergence="forward_kl", gan=GAN, **DMD), {}, False),  # type: ignore[arg-type]
    (tiny.tiny_unet2d, Consistency(solver="heun", weighting="inverse_gap", guidance_scale=3.0), {}, True),
    pytest.param(tiny.tiny_stable_diffusion, Consistency(guidance_range=(2.0, 5.0)), {"guidance_embedding": 256}, False, marks=pytest.mark.slow),
    pytest.param(tiny.tiny_stable_diffusion, DMD2(**DMD), {"lora": LoRA(2, 2, dora=True)}, True, marks=pytest.mark.slow),
    pytest.param(tiny.tiny_flux, DMD2(critic_steps=1), {"lora": LoRA(2, 2)}, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "method", "kind", "half"), CASES)
def test_a_step_and_a_sample_on_another_device(make: Any, method: Method, kind: dict[str, Any], half: bool) -> None:
    pipeline = make()
    for network in (c for c in pipeline.components.values() if isinstance(c, nn.Module)):
        nn.Module.to(network, torch.bfloat16 if half else torch.float32)
    with elsewhere() as device:
        pipeline.to(device)
        teacher = Teacher(pipeline, {"max_sequence_length": 16} if make is tiny.tiny_flux else None)
        teacher.check(5e-2 if half else 1e-5)
        teacher.rest_encoders()
        assert all(p.device.type == "cpu" for _, network in teacher.encoders() for p in network.parameters())
        condition = teacher.condition([teacher.placeholder()] * 2)
        method = method if condition.null is not None or method.name == "consistency" else method.model_copy(update={"guidance_scale": 1.0})
        roles, adapters = build_roles(teacher, method.roles, **kind)
        roles.state = {k: v.to(device) for k, v in method.initial_state().items()}
        roles.discriminator = _discriminator(method, teacher, roles)
        shape = (2, *teacher.sample_shape)
        updates = 0
        for role, loss, logs in method.step(roles, Batch(torch.randn(shape, device=device), condition, torch.randn(shape, device=device), 0.3)):
            assert all(v.device == ELSEWHERE for v in (loss, *logs.values()) if isinstance(v, torch.Tensor))
            parameters = [p for r in ((role,) if isinstance(role, str) else role) for p in roles.parameters(r)]
            loss.backward(inputs=parameters)
            assert all(p.grad is None or p.grad.device == ELSEWHERE for p in parameters)
            build_optimizer(Optimizer(), parameters).step()
            updates += 1
        assert updates == (1 if method.name == "consistency" else 3 if roles.discriminator is not None else 2)
        student = Student(teacher, roles.student, replace(method.sampler(), gamma=0.5), adapters)  # type: ignore[arg-type]
        images = student.images([teacher.placeholder()] * 2, generator=torch.Generator().manual_seed(0))
        theirs = teacher.sample(condition, teacher.noise(2, torch.Generator().manual_seed(0)), 2, 3.0 if condition.null is not None else 1.0)
        assert images.device == theirs.device == ELSEWHERE and bool(images.isfinite().all())
