"""Pipelines that scale the sample, or convert the answer, in their own loop: the network's own space is found by equality."""

import math
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SCMScheduler, UNet2DModel
from torch import Tensor

from distill.denoiser import Prediction
from distill.errors import UserError
from distill.preconditioned import factor, inside, schedules
from distill.schedule import CosineVP, Flow, NoiseSchedule, from_scheduler
from distill.teacher import Teacher
from distill.walk import CLOCKS, NORMS, Rescaled, VarianceExploding, Walk

T = torch.linspace(0.05, 0.999, 20, dtype=torch.float64)
BASES: dict[str, NoiseSchedule] = {"ve": VarianceExploding(0.002, 80.0), "circle": CosineVP(math.pi / 2, 0.5)}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("base", BASES)
def test_a_rescaled_schedule_is_the_base_over_its_norm(base: str, norm: str) -> None:
    own = Rescaled(BASES[base], norm, "share")
    (a, s), (alpha, sigma) = BASES[base].alpha_sigma(T), own.alpha_sigma(T)
    torch.testing.assert_close(sigma / alpha, s / a)
    n = {"sum": alpha + sigma, "root": alpha**2 + sigma**2, "one": alpha / a}[norm]
    torch.testing.assert_close(n, torch.ones_like(n))
    torch.testing.assert_close(own.ratio(T) * a, alpha)
    h = 1e-6
    for i in range(2):
        numeric = (own.alpha_sigma(T[:-1] + h)[i] - own.alpha_sigma(T[:-1] - h)[i]) / (2 * h)
        assert ((own.derivatives(T[:-1])[i] - numeric).abs() / numeric.abs().clamp_min(1)).max() < 1e-5


@pytest.mark.parametrize("clock", CLOCKS)
def test_clocks_are_inverted(clock: str) -> None:
    own = Rescaled(BASES["ve"], "sum", clock)
    torch.testing.assert_close(own.from_model_time(own.model_time(T)), T, atol=1e-9, rtol=0)


def test_variance_exploding_is_data_and_noise_at_the_schedulers_sigmas() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(5)
    schedule, kind = next(schedules(scheduler))
    assert kind == "eps"
    alpha, sigma = schedule.alpha_sigma(schedule.from_model_time(scheduler.timesteps))
    assert alpha.tolist() == [1.0] * 5
    torch.testing.assert_close(sigma.float(), scheduler.sigmas[:5], rtol=1e-5, atol=0)
    assert float(schedule.sigma(torch.tensor(1.0))) == pytest.approx(80) and float(schedule.sigma(torch.tensor(0.0))) == pytest.approx(0.002)


def test_trigflow_is_the_circle_in_units_of_sigma_data() -> None:
    schedule, kind = from_scheduler(SCMScheduler(sigma_data=0.5))
    assert kind == "v" and schedule.data_scale == 0.5
    alpha, sigma = schedule.alpha_sigma(schedule.from_model_time(torch.tensor(1.3)))
    assert (float(alpha), float(sigma)) == (pytest.approx(math.cos(1.3)), pytest.approx(math.sin(1.3)))


def test_a_walk_translates_states_and_answers() -> None:
    """TrigFlow with unit 0.5 outside, a rectified flow inside: what Sana-Sprint's loop computes, in its own words."""
    base = BASES["circle"]
    walk = Walk(base, "v", Rescaled(base, "sum", "share", 0.5), 0.5)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    angle = torch.tensor([0.9], dtype=torch.float64)
    t, share = walk.at(angle), torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))
    sample = 0.5 * (angle.cos() * x0 + angle.sin() * noise)
    state = walk.state(sample, t)
    torch.testing.assert_close(state, (1 - share) * x0 + share * noise)
    torch.testing.assert_close(state, sample / 0.5 * (share**2 + (1 - share) ** 2).sqrt())
    flow = torch.randn_like(x0)
    theirs = ((1 - 2 * share) * state + (1 - 2 * share + 2 * share**2) * flow) / (share**2 + (1 - share) ** 2).sqrt() * 0.5
    torch.testing.assert_close(walk.for_scheduler(Prediction(flow, "flow", state, t, walk.own)), theirs)


def test_a_factor_is_found_whatever_the_order() -> None:
    torch.manual_seed(0)
    source = torch.randn(1, 3, 4)
    assert factor(source, 0.25 * source) == pytest.approx(0.25, abs=1e-7)
    assert factor(source, 0.25 * source + 1e-3) is None
    for target in (0.25 * source.transpose(1, 2), torch.cat([torch.ones(1, 2, 4), 0.25 * source], 1)):
        found = inside(source, target)
        assert found is not None and found[1] == pytest.approx(0.25, abs=1e-7)
        torch.testing.assert_close(found[0], 0.25 * source)
    assert inside(source, torch.randn(1, 3, 4)) is None and inside(source, torch.randn(1, 2, 4)) is None


# -- whole pipelines ----------------------------------------------------------------------------------------------------


class Net(UNet2DModel):
    def forward(self, x: Tensor, clock: Tensor, return_dict: bool = True) -> Any:  # type: ignore[override]
        return super().forward(x, clock * 100, return_dict=False)


class LoopPipeline(DiffusionPipeline):
    """Walks with sigma · noise added to the data; its network is told a rectified flow, or (``style``) something else."""

    def __init__(self, net: Net, scheduler: FlowMatchEulerDiscreteScheduler, style: str = "flow") -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)
        self.register_to_config(style=style)

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, num_inference_steps: int = 10, generator: Any = None) -> Any:
        style = self.config.style
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(batch_size, 1, 8, 8, generator=generator)
        if style != "x0":
            x = x * self.scheduler.sigmas[0]
        for i, t in enumerate(self.scheduler.timesteps):
            sigma = self.scheduler.sigmas[i]
            if style == "x0":  # a flow whose network says x0, which the loop divides by no less than 0.05
                said = self.net(x, (t / 1000).expand(batch_size))[0]
                out = (x - said) / max(float(sigma), 0.05)
            elif style == "flow":
                share = sigma / (1 + sigma)
                said = self.net(x * (1 - share), share.expand(batch_size))[0]
                out = (x - ((1 - share) * x - share * said)) / sigma
            else:  # "edm", or a factor that no schedule has
                c_in = 1 / (1 + sigma**2).sqrt() if style == "edm" else 1 / (2 + sigma.sin())
                said = self.net(x * c_in, (sigma.log() / 4).expand(batch_size))[0]
                out = (x - (x * c_in**2 + sigma * c_in * said)) / sigma
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return (x,)


def loop(style: str) -> LoopPipeline:
    torch.manual_seed(0)
    net = Net(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
              layers_per_block=1, norm_num_groups=4)
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=style != "x0")
    if style != "x0":
        scheduler.register_to_config(sigma_min=0.002, sigma_max=80.0)
    pipeline = LoopPipeline(net, scheduler, style)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("style", "kind", "norm"), [("flow", "flow", "sum"), ("edm", "v", "root")])
def test_the_networks_own_schedule_is_found(style: str, kind: str, norm: str) -> None:
    teacher = Teacher(loop(style))
    schedule = teacher.denoiser.schedule
    assert isinstance(schedule, Rescaled) and (teacher.denoiser.kind, schedule.norm, teacher.scheduler_kind) == (kind, norm, "eps")
    assert teacher.denoiser.call.sign == (1 if kind == "flow" else -1)  # EDM's network says −v
    top = torch.ones(())
    assert float(schedule.alpha(top)) == pytest.approx(1 / 81 if norm == "sum" else (1 + 80**2) ** -0.5)
    assert teacher.check() < 1e-5 and teacher.reproduce(6) < 1e-5
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = teacher.pipeline(num_inference_steps=6, generator=torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(teacher.sample(teacher.condition([None]), noise, 6), theirs, atol=1e-4, rtol=0)


def test_a_factor_that_nothing_explains_is_refused() -> None:
    with pytest.raises(UserError, match="the scheduler's sample was found in no argument of Net"):
        Teacher(loop("odd"))


def test_the_floor_of_a_conversion_is_found() -> None:
    teacher = Teacher(loop("x0"))
    assert (teacher.denoiser.kind, teacher.scheduler_kind, teacher.walk.floor) == ("x0", "velocity", 0.05)
    assert teacher.reproduce(4) < 1e-5


def test_time_from_noise_to_data() -> None:
    schedule, _ = from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    assert isinstance(schedule, Flow) and schedule.inverted
    assert schedule.model_time(torch.tensor([0.25, 1.0])).tolist() == [750.0, 0.0] and schedule.sigma(schedule.from_model_time(torch.tensor(0.0))) == 1
