"""Memory options change where numbers are kept, not what they are."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import perturb, tiny_unet2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.adapters import LoRA
from distill.attention import check_xformers, use_attention
from distill.config import load_config
from distill.denoiser import BackboneDenoiser, Condition
from distill.errors import UserError
from distill.memory import Offload, checkpoint_activations, offload
from distill.roles import Roles, average, build_roles, round_at_random
from distill.run import build
from distill.selection import Selection
from distill.teacher import Teacher

LAYERS = ("down_blocks.0.resnets.0", "mid_block", "up_blocks.1.resnets.0.conv1")  # the last one ends a forward inside a checkpointed block


def setting(**kind: Any) -> tuple[Roles, Any, Tensor, Tensor, Condition]:
    torch.manual_seed(0)
    teacher = Teacher(tiny_unet2d())
    roles, adapters = build_roles(teacher, ["student", "critic"], **kind)
    perturb(roles.parameters("student"), seed=1)
    perturb(roles.parameters("critic"), seed=2)
    x = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(3))
    return roles, adapters, x, torch.full((2,), 0.6, dtype=torch.float64), teacher.condition([3, 7])


def gradients(roles: Roles, x: Tensor, t: Tensor, condition: Condition) -> dict[str, list[Tensor]]:
    """Of losses as the methods have them: through the student alone, and from hidden features of teacher and critic into
    the student's sample; and, for the critic, of a loss on its output and its features together."""
    assert roles.critic is not None
    student, critic = roles.parameters("student"), roles.parameters("critic")
    sample = roles.student(x, t, condition)
    loss = sample.square().mean()
    for network in (roles.teacher, roles.critic):
        loss = loss + sum(f.square().mean() for f in network.features(sample, t, condition, LAYERS).values())
    found = {"student": list(torch.autograd.grad(loss, student))}
    prediction = roles.critic.predict(x, t, condition, LAYERS)
    loss = prediction.value.square().mean() + sum(f.square().mean() for f in prediction.features.values())
    found["critic"] = list(torch.autograd.grad(loss, critic))
    return found


@pytest.mark.parametrize("kind", [{}, {"lora": LoRA(2, 2)}, {"lora": LoRA(2, 2, dora=True)}, {"selection": Selection(("mid_block", "up_blocks"))}])
def test_checkpointed_gradients_are_the_same(kind: dict[str, Any]) -> None:
    roles, adapters, *inputs = setting(**kind)
    plain = gradients(roles, *inputs)
    networks = [n for n in (roles.teacher, roles.student, roles.critic) if isinstance(n, BackboneDenoiser)]
    calls = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1

    blocks = [b.get_submodule("down_blocks.0.resnets.0.conv1") for b in {id(n.backbone): n.backbone for n in networks}.values()]
    handles = [block.register_forward_pre_hook(count) for block in blocks]
    gradients(roles, *inputs)
    once, calls = calls, 0
    for network in networks:
        checkpoint_activations(network.backbone, adapters)
    again = gradients(roles, *inputs)
    assert calls > once  # blocks did run a second time
    for handle in handles:
        handle.remove()
    for role in plain:
        for a, b in zip(plain[role], again[role], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert sum(bool(g.any()) for g in plain[role]) >= 0.9 * len(plain[role])
    assert adapters is None or adapters.active is None


def test_checkpoints_that_forget_the_adapter_are_wrong() -> None:
    """The ablation: diffusers' own checkpointing of a shared backbone computes the blocks again without the adapter."""
    roles, adapters, *inputs = setting(lora=LoRA(2, 2))

    def forgetful(block: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(block, *args, use_reentrant=False, determinism_check="none", early_stop=False)

    roles.student.backbone.enable_gradient_checkpointing(gradient_checkpointing_func=forgetful)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):  # a CheckpointError, or the backward pass of a layer that was computed with other inputs
        gradients(roles, *inputs)


def test_backbones_without_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="Linear has no blocks to checkpoint"):
        checkpoint_activations(nn.Linear(2, 2))


def test_a_backbone_that_computes_something_else_under_checkpointing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers 0.42's Chroma, whose checkpointed path leaves out the attention mask."""
    settings = ["trainer.gradient_checkpointing=true", "trainer.device=cpu", f"output.folder={tmp_path}"]
    assert build(load_config("quickstart", settings)).roles.student is not None

    def lossy(backbone: nn.Module, adapters: Any) -> None:
        checkpoint_activations(backbone, adapters)
        perturb(backbone.parameters())

    monkeypatch.setattr("distill.run.checkpoint_activations", lossy)
    with pytest.raises(UserError, match="trainer.gradient_checkpointing: UNet2DModel does not work with it.*its output changes by"):
        build(load_config("quickstart", settings))


def test_blocks_may_be_called_with_named_arguments() -> None:
    """As diffusers' HunyuanImage calls them."""
    calls: dict[str, Any] = {}

    class Backbone:
        def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any) -> None:
            calls["run"] = gradient_checkpointing_func

    checkpoint_activations(Backbone())  # type: ignore[arg-type]
    x = torch.ones(2, requires_grad=True)
    y = calls["run"](lambda a, *, scale: (a * scale).exp(), x, scale=torch.tensor(3.0))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 3 * torch.exp(torch.full((2,), 3.0)))


# -- offload ------------------------------------------------------------------------------------------------------------


class Moves:
    """Counts the bytes that are woken; on the CPU the device and the home are one memory."""

    def __init__(self, waiting: Offload) -> None:
        self.awake: list[bool] = []
        wake, rest = waiting.wake, waiting.rest
        waiting.wake = lambda: (self.awake.append(True), wake())[1]  # type: ignore[method-assign,func-returns-value]
        waiting.rest = lambda: (self.awake.append(False), rest())[1]  # type: ignore[method-assign,func-returns-value]


def test_idle_weights_come_and_go() -> None:
    roles, _, x, t, condition = setting()
    teacher, student = roles.teacher, roles.student
    assert isinstance(teacher, BackboneDenoiser) and isinstance(student, BackboneDenoiser)
    before = teacher(x, t, condition)
    waiting = offload(teacher, student.parameters(), torch.device("cpu"))
    assert waiting is not None and len(waiting.tensors) == len(list(teacher.backbone.parameters())) - 1
    moves = Moves(waiting)
    with torch.no_grad():
        assert torch.equal(teacher(x, t, condition), before)
    assert moves.awake == [True, False]
    # A graph through the weights keeps them there, also past a forward without one.
    sample = x.clone().requires_grad_()
    loss = sum(f.square().mean() for f in teacher.features(sample, t, condition, LAYERS).values())
    with torch.no_grad():
        teacher(x, t, condition)
    assert moves.awake == [True, False, True, True]
    torch.autograd.grad(loss, sample)
    waiting.rest()
    with torch.no_grad():
        assert torch.equal(teacher(x, t, condition), before)
    assert moves.awake[-2:] == [True, False]


def test_weights_are_on_the_device_only_while_they_are_used() -> None:
    """With another dtype in the place of a device, to see the moves."""
    layer = nn.Linear(3, 3).requires_grad_(False)
    waiting = Offload(layer.parameters(), torch.device("cpu"))
    homes = [h.clone() for h in waiting.homes]
    waiting.homes = [h.double() for h in waiting.homes]  # "the CPU"
    waiting.rest()
    assert layer.weight.dtype == torch.float64
    with torch.no_grad(), waiting.using():
        assert waiting._awake
    assert layer.weight.dtype == torch.float64 and torch.equal(layer.weight.float(), homes[0])
    # A resting network that follows another is changed where it rests.
    source = nn.Linear(3, 3)
    average(layer.parameters(), source.parameters(), 0.75)
    torch.testing.assert_close(waiting.homes[0], (0.75 * homes[0] + 0.25 * source.weight).double(), check_dtype=False)


def test_shared_weights_do_not_wait() -> None:
    roles, _, x, t, condition = setting(selection=Selection(("mid_block",)))
    assert isinstance(roles.teacher, BackboneDenoiser) and isinstance(roles.student, BackboneDenoiser)
    waiting = offload(roles.teacher, roles.student.backbone.parameters(), torch.device("cpu"))
    assert waiting is not None
    names = {id(p): n for n, p in roles.teacher.backbone.named_parameters()}
    assert all(names[id(p)].startswith("mid_block.") for p in waiting.tensors)
    shared, *_ = setting(lora=LoRA(2, 2))
    assert isinstance(shared.teacher, BackboneDenoiser)
    assert offload(shared.teacher, shared.teacher.backbone.parameters(), torch.device("cpu")) is None


# -- averaged weights ---------------------------------------------------------------------------------------------------


def test_averages_in_bfloat16_follow_those_in_float32() -> None:
    """A decay of 0.999 moves by less than half a step of bfloat16: rounding to the nearest stands still, at random follows."""
    weights = 1 + torch.rand(4096, generator=torch.Generator().manual_seed(0))
    exact, rounded, stuck = weights.clone(), weights.bfloat16(), weights.bfloat16()
    target = weights + 0.25
    for step in range(700):
        average([exact], [target], 0.999)
        average([rounded], [target], 0.999, seed=step)
        average([stuck], [target], 0.999)
    moved = 0.25 * (1 - 0.999**700)
    assert exact.sub(weights).mean().item() == pytest.approx(moved, rel=1e-3)
    assert rounded.float().sub(weights).mean().item() == pytest.approx(moved, rel=0.02)
    assert (rounded.float() - exact).abs().max() < 0.12 and rounded.dtype == torch.bfloat16
    assert stuck.float().sub(weights).mean().abs() < 0.02


def test_random_rounding_is_right_on_average() -> None:
    x = torch.tensor([1.001, -3.3, 0.0, 2.0**-20 * 1.003]).repeat(20000, 1)
    rounded = round_at_random(x, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.bfloat16().float()) and torch.equal(rounded[:, 2], x[:, 2])
    spacing = 2.0 ** (torch.log2(x[0].abs().clamp_min(1e-30)).floor() - 7)
    assert ((rounded - x).abs().amax(0) <= spacing + 1e-12).all()
    tolerance = 4 * spacing / math.sqrt(len(x))
    assert ((rounded.double().mean(0) - x[0]).abs() <= tolerance.double() + 1e-12).all()


def test_averages_across_dtypes_are_plain_where_nothing_is_lost() -> None:
    target, source = [torch.ones(3)], [torch.full((3,), 2.0, dtype=torch.bfloat16)]
    average(target, source, 0.75)
    assert torch.equal(target[0], torch.full((3,), 1.25))
    copied = [torch.zeros(3)]
    average(copied, source, 0.0)
    assert torch.equal(copied[0], torch.full((3,), 2.0))


# -- attention ----------------------------------------------------------------------------------------------------------


def test_attention_kernels() -> None:
    roles, _, x, t, condition = setting()
    before = roles.student(x, t, condition)
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    backbone: Any = roles.student.backbone  # type: ignore[attr-defined]
    layers = [m for m in backbone.modules() if hasattr(m, "processor")]
    for layer in layers:
        layer.set_processor(AttnProcessor())
    use_attention(backbone, "default", torch.device("cpu"))
    assert len(layers) >= 3 and all(type(layer.processor) is AttnProcessor for layer in layers)
    use_attention(backbone, "sdpa", torch.device("cpu"))
    assert all(type(layer.processor) is AttnProcessor2_0 for layer in layers)
    torch.testing.assert_close(roles.student(x, t, condition), before)
    with pytest.raises(UserError, match="Linear has no attention layer"):
        use_attention(nn.Linear(2, 2), "sdpa", torch.device("cpu"))


def test_flash_allows_no_other_kernel() -> None:
    """On the CPU PyTorch's flash kernel exists too, and takes no masks and no head of width 4 on every build: all that is
    tested is which kernels are allowed, inside the layers and after them."""
    roles, _, x, t, condition = setting()
    backbone: Any = roles.student.backbone  # type: ignore[attr-defined]
    use_attention(backbone, "flash", torch.device("cpu"))
    allowed: list[bool] = []
    layer = backbone.mid_block.attentions[0]
    inner = layer.processor

    class Watch:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            allowed.append(torch.backends.cuda.math_sdp_enabled())
            return inner(*args, **kwargs)

    layer.processor = Watch()
    roles.student(x, t, condition)  # float32: any kernel
    with torch.autocast("cpu", torch.bfloat16):
        roles.student(x, t, condition)
    layer.processor = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16):
        roles.student(x, t, condition)
    assert allowed == [True, False] and torch.backends.cuda.math_sdp_enabled()


def test_xformers_that_cannot_run_say_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    monkeypatch.setattr("distill.attention.missing_xformers", lambda: None)
    ops = types.ModuleType("xformers.ops")

    def broken(*args: Any) -> Any:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n     query: …")

    ops.memory_efficient_attention = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    with pytest.raises(UserError, match=r"does not run on this cpu device \(No operator found for `memory_efficient_attention_forward` with inputs:\): set"):
        check_xformers(torch.device("cpu"))
