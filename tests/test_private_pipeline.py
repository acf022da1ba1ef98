"""A pipeline that the toolkit has never seen: its own class, its own network, a conditioning argument of its own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from distill.errors import UserError
from distill.methods.base import Batch
from distill.methods.consistency import Consistency
from distill.methods.dmd2 import DMD2
from distill.overrides import Override
from distill.roles import build_roles
from distill.teacher import Teacher


class MoodUNet(UNet2DModel):
    """A UNet that is told a mood (a vector) beside its class, takes tokens' order for its state and has times of its own."""

    def __init__(self, moods: int = 4, **settings: Any) -> None:
        super().__init__(**settings)
        self.mood = nn.Linear(moods, 1)

    def forward(self, pixels: Tensor, clock: Tensor, mood: Tensor, extra: dict[str, Any], return_dict: bool = True) -> Any:  # type: ignore[override]
        square = pixels.transpose(1, 2).reshape(len(pixels), 1, 8, 8) + self.mood(mood)[..., None, None]
        answer = super().forward(square, (1 - clock) * 1000, class_labels=extra["which"], return_dict=False)[0]
        return (-answer.reshape(len(pixels), 1, 64).transpose(1, 2),)


class MoodPipeline(DiffusionPipeline):
    """Packs its samples into tokens, runs its network's clock backwards, negates its answer, and doubles its batch with the
    conditional half first."""

    def __init__(self, net: MoodUNet, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, class_labels: list[int], mood: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4), guidance_scale: float = 2.0, num_inference_steps: int = 20,
        generator: Any = None, drifting: bool = False,
    ) -> Any:
        batch = len(class_labels)
        x = torch.randn(batch, 1, 8, 8, generator=generator)
        labels, moods = torch.tensor(class_labels), torch.tensor([mood] * batch)
        guided = guidance_scale > 1
        if guided:
            labels, moods = torch.cat([labels, torch.full_like(labels, 10)]), torch.cat([moods, torch.zeros_like(moods)])
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            tokens = x.reshape(batch, 1, 64).transpose(1, 2)
            tokens = torch.cat([tokens, tokens]) if guided else tokens
            more = {"mood": moods + 0.1 * i * i} if drifting else {"mood": moods}
            out = -self.net(tokens, clock=(1 - t / 1000).expand(len(tokens)), extra={"which": labels}, return_dict=False, **more)[0]
            if guided:
                cond, null = out.chunk(2)
                out = null + guidance_scale * (cond - null)
            x = self.scheduler.step(out.transpose(1, 2).reshape(batch, 1, 8, 8), t, x, return_dict=False)[0]
        return x


def pipeline() -> MoodPipeline:
    torch.manual_seed(0)
    net = MoodUNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=11,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    made = MoodPipeline(net, DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made


def test_it_works_through_probing_alone() -> None:
    teacher = Teacher(pipeline())
    call = teacher.denoiser.call
    assert (teacher.backbone_name, call.state, call.sign, teacher.sample_shape) == ("net", "pixels", -1.0, (1, 8, 8))
    assert call.times["clock"].scale == pytest.approx(-0.001) and call.times["clock"].shift == 1.0
    assert teacher.guidance is not None and (teacher.guidance.conditional, teacher.guidance.copies, teacher.guidance.rule) == (0, 2, "plain")
    condition = teacher.condition([3, 7])
    assert condition.null is not None
    assert condition.values["extra.which"].tolist() == [3, 7] and condition.null["extra.which"].tolist() == [10, 10]  # type: ignore[union-attr]
    torch.testing.assert_close(condition.values["mood"], torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2))
    assert teacher.check() == 0 and teacher.reproduce(4) <= 1e-5 and teacher.reproduce(4, 3.0) <= 1e-5
    other_mood = Teacher(pipeline(), {"mood": (1.0, 0.0, 0.0, 0.0)})
    torch.testing.assert_close(other_mood.condition([3]).values["mood"], torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("method", [DMD2(critic_steps=1, guidance_scale=3.0), Consistency(guidance_scale=3.0, target="stop_gradient")])
def test_it_can_be_distilled(method: Any) -> None:
    teacher = Teacher(pipeline())
    roles, _ = build_roles(teacher, method.roles)
    frozen = [p.clone() for p in teacher.backbone.parameters()]
    batch = Batch(torch.randn(2, 1, 8, 8), teacher.condition([3, 7]), torch.rand(2, 1, 8, 8))
    for role, loss, _ in method.step(roles, batch):
        gradients = torch.autograd.grad(loss, roles.parameters(role))
        assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.backbone.parameters(), strict=True))


def test_what_cannot_be_inferred_is_named() -> None:
    with pytest.raises(UserError, match=r"argument 'mood' of MoodUNet changes from step to step.*say it in an override: Override\(constants="):
        Teacher(pipeline(), {"drifting": True})
    settled = Teacher(pipeline(), {"drifting": True}, Override(constants={"mood": torch.tensor([[0.1, 0.2, 0.3, 0.4]])}))
    assert "mood" in settled.denoiser.call.constants and not settled.condition([1]).values.keys() & {"mood"}


def test_a_network_that_the_override_names_must_exist() -> None:
    with pytest.raises(UserError, match="it has no network 'nett'"):
        Teacher(pipeline(), override=replace(Override(), network="nett"))
