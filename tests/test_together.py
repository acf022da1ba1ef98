"""Teacher and critic in one call give what two calls give; what cannot be joined is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from distill.adapters import LoRA
from distill.config import load_config
from distill.denoiser import BackboneDenoiser
from distill.errors import UserError
from distill.guidance import Guided
from distill.methods.base import Batch
from distill.methods.dmd2 import DMD2
from distill.plan import make_plan
from distill.roles import Roles, build_roles
from distill.run import _together, build
from distill.teacher import Teacher
from distill.together import Question


def setting(make: Any) -> tuple[Teacher, Roles, torch.Tensor, Any]:
    torch.manual_seed(0)
    teacher = Teacher(make(), {"max_sequence_length": 16} if make is tiny.tiny_flux else None)
    roles, adapters = build_roles(teacher, ["student", "critic"], LoRA(2, 4))
    assert adapters is not None
    roles.together = _together(teacher, roles, adapters)
    tiny.perturb(roles.parameters("critic"), 0.3)
    tiny.perturb(roles.parameters("student"), 0.3, seed=5)
    return teacher, roles, torch.randn(3, *teacher.sample_shape), teacher.condition([teacher.placeholder()] * 3)


@pytest.mark.parametrize("make", [tiny.tiny_unet2d, tiny.tiny_stable_diffusion, tiny.tiny_sd3, tiny.tiny_flux, tiny.tiny_dit])
def test_one_call_equals_two(make: Any) -> None:
    teacher, roles, x, condition = setting(make)
    assert roles.together is not None and roles.critic is not None
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    guided = Guided(roles.teacher, 1.0 if condition.null is None else 4.0)
    asked = guided.asked(x, t, condition)
    assert asked is not None and asked[2] is not None
    calls: list[int] = []
    handle = teacher.backbone.register_forward_pre_hook(lambda module, args: calls.append(1))
    both = roles.together.ask([Question(None, *asked), Question("critic", x, t, condition)])  # type: ignore[arg-type]
    handle.remove()
    assert both is not None and len(calls) == 1
    real, fake = guided.predict(x, t, condition), roles.critic.predict(x, t, condition)
    for one, two in ((guided.answered(both[0], x, t, condition), real), (both[1], fake)):
        torch.testing.assert_close(one.value, two.value, rtol=0, atol=1e-5 * max(1.0, float(two.value.detach().abs().max())))
        torch.testing.assert_close(one.x0, two.x0, rtol=1e-4, atol=1e-4)
    assert (real.value - fake.value).abs().max() > 1e-2  # they are two
    with torch.no_grad():  # and afterwards each is itself again
        assert torch.equal(roles.critic.predict(x, t, condition).value, fake.value)


def test_a_step_of_dmd2_is_the_same() -> None:
    """Losses, gap and the student's gradient, with guidance; and the networks are called once less."""
    _, roles, x, condition = setting(tiny.tiny_stable_diffusion)
    assert isinstance(roles.student, BackboneDenoiser)
    method, together, found = DMD2(guidance_scale=4.0, critic_steps=1), roles.together, []
    for roles.together in (None, together):
        torch.manual_seed(1)
        calls: list[int] = []

        def count(module: Any, args: Any, kwargs: Any, calls: list[int] = calls) -> None:
            calls.append(len(kwargs["sample"]))

        handle = roles.student.backbone.register_forward_pre_hook(count, with_kwargs=True)
        role, loss, logs = next(method.step(roles, Batch(x, condition)))
        handle.remove()
        assert role == "student"
        found.append((calls, logs["score_gap"], torch.autograd.grad(loss, roles.parameters("student"))))
    (apart, gap, gradients), (joined, same_gap, same_gradients) = found
    assert apart == [3, 6, 3] and joined == [3, 9]
    torch.testing.assert_close(gap, same_gap, rtol=1e-5, atol=1e-7)
    for a, b in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_layer_that_mixes_rows_is_refused() -> None:
    """The check at the start asks a critic that differs from the teacher, both ways."""
    teacher = Teacher(tiny.tiny_unet2d())
    roles, adapters = build_roles(teacher, ["student", "critic"], LoRA(2, 2))
    assert adapters is not None
    layer: Any = adapters.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0].flip(0), *args[1:]), kwargs), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, out: out.flip(0))  # equal for one adapter, wrong for two
    with pytest.raises(UserError, match="trainer.batched_roles: UNet2DModel answers otherwise in one call"):
        _together(teacher, roles, adapters)
    with pytest.raises(ValueError, match="5 rows for 2 samples"), adapters.mixed([(None, 1), ("critic", 1)]), torch.no_grad():
        layer(torch.zeros(5, *[4] * 3))


LORA = ("student.weights=lora", "student.lora.rank=2", "trainer.batched_roles=true", "method={name: dmd2, guidance_scale: 3.0, critic_steps: 1}")


def test_the_setting(tmp_path: Path) -> None:
    def config(*settings: str) -> Any:
        return load_config("quickstart", ["trainer.device=cpu", f"output.folder={tmp_path}", "trainer.batch_size=4", *settings])

    assert build(config(*LORA)).roles.together is not None
    for settings, message in (
        (("trainer.batched_roles=true",), "needs a backbone that the roles share"), ((*LORA, "student.lora.dora=true"), "does not go with DoRA"),
        ((*LORA, "trainer.compile=true"), "does not go with trainer.compile"),
        ((*LORA, "method={name: consistency}"), "has nothing to join: method consistency as set here has no critic"),
    ):
        with pytest.raises(UserError, match=f"trainer.batched_roles: {message}"):
            config(*settings)
    apart, joined = (make_plan(config(*LORA, f"trainer.batched_roles={on}"), "cpu") for on in ("false", "true"))
    assert [(c["role"], c["batch"]) for c in joined.calls] == [("critic", 4), ("student", 4), ("teacher and critic", 12)]
    assert [(c["role"], c["batch"], c["forwards"]) for c in apart.calls] == [("critic", 4, 2), ("student", 4, 2), ("teacher", 8, 1)]
    assert sum(joined.flops.values()) == pytest.approx(sum(apart.flops.values()), rel=0.02)
