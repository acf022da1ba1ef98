"""Directional derivatives: against float64 central differences of fourth order, through schedules, conversions and diffusers' backbones."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import perturb, tiny_dit, tiny_flux, tiny_sd3, tiny_stable_diffusion, tiny_unet2d, vp_scheduler
from torch import Tensor, nn

from distill import jvp as module
from distill.analytic import gaussian, ring
from distill.denoiser import BackboneDenoiser, Condition
from distill.errors import UserError
from distill.jvp import directional_derivative, jvp
from distill.memory import checkpoint_activations
from distill.roles import build_roles
from distill.schedule import EDM, KINDS, CosineVP, Flow, Kind, OffsetCosineVP, PreconditionedEDM, from_scheduler
from distill.teacher import Teacher

SCHEDULES = {
    "tabulated": from_scheduler(vp_scheduler())[0], "zero-SNR": from_scheduler(vp_scheduler("v_prediction", zero_snr=True))[0], "cosine": CosineVP(),
    "flow": Flow(), "edm": EDM(), "preconditioned": PreconditionedEDM(0.002, 80.0, 7.0, 0.5), "offset cosine": OffsetCosineVP(),
}
#: between the nodes of the tables, where float32 holds the backbone's clock (249.5, or 250.5) exactly
T = torch.tensor([0.2505, 0.7505], dtype=torch.float64)


def differences(along: Callable[[float], Tensor], h: float) -> Tensor:
    """The derivative at 0, to fourth order."""
    return (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_analytic_denoisers(name: str, kind: Kind, mode: Any) -> None:
    schedule = SCHEDULES[name]
    for teacher in (gaussian(schedule, (0.5, -0.3), (0.6, 0.9)), ring(schedule)):
        torch.manual_seed(0)
        t = torch.tensor([0.05, 0.3123, 0.5, 0.77, 0.9], dtype=torch.float64) + 3e-4  # between the nodes of the tables
        x = schedule.add_noise(teacher.sample(5).double(), torch.randn(5, 2, dtype=torch.float64), t)
        v_x, v_t = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        expected = differences(lambda h: teacher.predict(x + h * v_x, t + h * v_t).as_kind(kind), 5e-5)  # noqa: B023
        value, derivative = directional_derivative(teacher, x, t, v_x=v_x, v_t=v_t, kind=kind, mode=mode)
        assert torch.equal(value, teacher.predict(x, t).as_kind(kind)) and not derivative.requires_grad
        assert relative(derivative, expected) < 1e-4, type(teacher)


BACKBONES: dict[str, Callable[[], Any]] = {
    "unet2d v": lambda: tiny_unet2d(zero_snr=False), "unet2d eps": lambda: tiny_unet2d(None, "epsilon", False),
    "stable diffusion eps": tiny_stable_diffusion, "stable diffusion v": lambda: tiny_stable_diffusion("v_prediction", True),
    "sd3": tiny_sd3, "flux": tiny_flux, "dit": tiny_dit,
}


def build(name: str) -> Teacher:
    teacher = Teacher(BACKBONES[name](), {"max_sequence_length": 16}) if name == "flux" else Teacher(BACKBONES[name]())
    perturb(teacher.backbone.parameters(), 0.05)  # fresh output layers are zero
    return teacher


def reference(denoiser: BackboneDenoiser, x: Tensor, t: Tensor, condition: Condition, v_x: Tensor, v_t: float, kind: Kind) -> Tensor:
    """Of the network in float64; times are moved by a sixteenth of a step of the backbone's clock, which float32 holds exactly."""
    exact = copy.copy(denoiser)
    exact.backbone = copy.deepcopy(denoiser.backbone).double()
    exact.dtype = torch.float64
    return differences(lambda h: exact.predict(x.double() + h * v_x.double(), t + h * v_t, condition).as_kind(kind), 1 / 16000)


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name: str) -> None:
    teacher = build(name)
    denoiser, condition = teacher.denoiser, teacher.condition([teacher.placeholder()] * 2)
    torch.manual_seed(0)
    x, v_x, t = torch.randn(2, *teacher.sample_shape), torch.randn(2, *teacher.sample_shape), T
    for kind in ("x0", denoiser.kind, "velocity"):
        expected = reference(denoiser, x, t, condition, v_x, 1.0, kind)
        value, derivative = directional_derivative(denoiser, x, t, condition, v_x=v_x, v_t=torch.ones(()), kind=kind, mode="exact")
        torch.testing.assert_close(value, denoiser.predict(x, t, condition).as_kind(kind), rtol=1e-4, atol=1e-5)
        assert relative(derivative, expected) < 1e-3, kind
        _, fallback = directional_derivative(denoiser, x, t, condition, v_x=v_x, v_t=torch.ones(()), kind=kind, mode="finite_difference")
        assert relative(fallback, expected) < 2e-2, kind


def test_under_gradient_checkpointing_beside_a_graph_and_with_an_adapter() -> None:
    """Nothing of the derivative joins the graph, and the graph of the same network is as ever."""
    from distill.adapters import LoRA

    teacher = build("stable diffusion eps")
    roles, adapters = build_roles(teacher, ["student"], LoRA(4, 4.0))
    perturb(roles.parameters("student"), 0.1)
    checkpoint_activations(teacher.backbone, adapters)
    student, condition = roles.student, teacher.condition(["a cat"] * 2)
    assert isinstance(student, BackboneDenoiser)
    torch.manual_seed(0)
    x, v, t = torch.randn(2, *teacher.sample_shape), torch.randn(2, *teacher.sample_shape), T
    value, derivative = directional_derivative(student, x, t, condition, v_x=v, v_t=torch.ones(()), mode="exact")
    with torch.no_grad():
        expected = differences(lambda h: student(x + h * v, t + h, condition).double(), 1 / 4000)
    assert relative(derivative, expected) < 2e-3
    loss = (student(x, t, condition) - value - derivative).square().mean()
    loss.backward()
    assert all(p.grad is not None for n, p in student.named_parameters().items() if "lora_B" in n)


class Rounding(torch.autograd.Function):
    """An operation without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rounding.apply(x)  # type: ignore[no-any-return]


def test_an_operation_without_forward_mode_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    network, calls = Odd(), []

    def function(x: Tensor) -> Tensor:
        calls.append(len(x))
        return network(x)  # type: ignore[no-any-return]

    x, v = torch.linspace(-1, 1, 6).reshape(3, 2), torch.ones(3, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            value, derivative = jvp(function, [x], [v], owner=network)
            torch.testing.assert_close(derivative, x.cos(), rtol=1e-3, atol=1e-3)
    assert len(caplog.records) == 1 and "central differences" in caplog.text and len(calls) == 7  # one try, two times three
    with pytest.raises(UserError, match="finite_difference"):
        jvp(function, [x], [v], "exact", owner=network)
    with pytest.raises(ValueError, match="mine"):  # the function's own mistakes are not taken for it

        def wrong(x: Tensor) -> Tensor:
            raise ValueError("mine")

        jvp(wrong, [x], [v])


def test_finite_differences_of_half_precision_are_refused() -> None:
    teacher = Teacher(tiny_unet2d())
    denoiser = copy.copy(teacher.denoiser)
    denoiser.backbone, denoiser.dtype = copy.deepcopy(denoiser.backbone).bfloat16(), torch.bfloat16
    x, condition = torch.randn(2, *teacher.sample_shape), teacher.condition([0, 1])
    with pytest.raises(UserError, match="float32"):
        directional_derivative(denoiser, x, torch.tensor(0.5), condition, v_t=torch.ones(()), mode="finite_difference")
    _, narrow = directional_derivative(denoiser, x, torch.tensor(0.5), condition, v_x=torch.randn_like(x), v_t=torch.ones(()), mode="exact")
    assert narrow.isfinite().all()


def test_the_log_tells_of_attention_once(caplog: pytest.LogCaptureFixture) -> None:
    teacher = Teacher(tiny_unet2d())
    x, condition = torch.randn(2, *teacher.sample_shape), teacher.condition([0, 1])
    module._told.discard(teacher.backbone)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            directional_derivative(teacher.denoiser, x, torch.tensor(0.5), condition, v_x=x)
    assert [r.message for r in caplog.records if "math kernel" in r.message] != [] and len(caplog.records) == 1
