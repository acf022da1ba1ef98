"""Schedules: conversions are exact inverses, derivatives are derivatives, and diffusers agrees."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tiny import vp_scheduler

from distill.schedule import EDM, KINDS, CosineVP, Flow, NoiseSchedule, TabulatedVP, from_scheduler
from distill.walk import Rescaled, VarianceExploding

CASES: dict[str, NoiseSchedule] = {
    "sd": from_scheduler(vp_scheduler())[0],
    "sd zero-SNR": from_scheduler(vp_scheduler("v_prediction", zero_snr=True))[0],
    "cosine": from_scheduler(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))[0],
    "cosine zero-SNR": from_scheduler(DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True))[0],
    "trigonometric": CosineVP(),
    "flow": Flow(),
    "edm": EDM(),
    "variance exploding": VarianceExploding(0.002, 80.0),
    "rectified by the loop": Rescaled(VarianceExploding(0.002, 80.0), "sum", "share"),
}
ENDS = torch.tensor([1e-5, 1e-4, 1 - 1e-4, 1 - 1e-5], dtype=torch.float64)
INSIDE = torch.cat([ENDS, torch.linspace(0.002, 0.998, 83, dtype=torch.float64)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_round_trips(name: str, rank: int) -> None:
    """Every kind → every other → back, from float32 data, to 1e-6 of the value's own size."""
    schedule = CASES[name]
    torch.manual_seed(0)
    shape = (len(INSIDE), 3, 4, 2, 2)[:rank]
    x0, noise = torch.randn(shape), torch.randn(shape)
    x_t = schedule.add_noise(x0, noise, INSIDE)
    for source, target in itertools.permutations(KINDS, 2):
        value = schedule.convert(x0, x_t, INSIDE, "x0", source).float()
        there = schedule.convert(value, x_t, INSIDE, source, target)
        back = schedule.convert(there, x_t, INSIDE, target, source)
        scale = value.abs().clamp_min(1)
        assert ((back - value).abs() / scale).max() <= 1e-6, (source, target)


@pytest.mark.parametrize("name", CASES)
def test_conversions_recover_what_was_mixed(name: str) -> None:
    """x0, noise and their definitions, all in float64: v, velocity and score are what the module says."""
    schedule = CASES[name]
    torch.manual_seed(0)
    x0, noise = (torch.randn(len(INSIDE), 5, dtype=torch.float64) for _ in range(2))
    x_t = schedule.add_noise(x0, noise, INSIDE)
    alpha, sigma = schedule.coefficients(x0, INSIDE)
    d_alpha, d_sigma = (d[:, None] for d in schedule.derivatives(INSIDE))
    expected = {
        "eps": noise, "v": alpha * noise - sigma * x0, "velocity": d_alpha * x0 + d_sigma * noise, "score": -noise / sigma, "flow": noise - x0,
    }
    for kind, value in expected.items():
        got = schedule.convert(x0, x_t, INSIDE, "x0", kind)  # type: ignore[arg-type]
        assert ((got - value).abs() / value.abs().clamp_min(1)).max() < 1e-8, kind


@pytest.mark.parametrize("name", CASES)
def test_derivatives_against_central_differences(name: str) -> None:
    schedule, h = CASES[name], 1e-6
    t = (torch.arange(1, 998, 7, dtype=torch.float64) + 0.5) / 1000  # between the nodes of a table
    for i in range(2):
        numeric = (schedule.alpha_sigma(t + h)[i] - schedule.alpha_sigma(t - h)[i]) / (2 * h)
        assert ((schedule.derivatives(t)[i] - numeric).abs() / numeric.abs().clamp_min(1)).max() < 1e-5


@pytest.mark.parametrize("zero_snr", [False, True])
def test_agrees_with_diffusers(zero_snr: bool) -> None:
    scheduler = vp_scheduler("v_prediction", zero_snr)
    schedule, kind = from_scheduler(scheduler)
    assert kind == "v"
    k = torch.tensor([0, 1, 499, 998, 999])
    t = schedule.from_model_time(k)
    assert torch.equal(schedule.model_time(t), k.double())
    x0, noise = torch.randn(5, 3), torch.randn(5, 3)
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, k), atol=1e-6, rtol=0)
    v = scheduler.get_velocity(x0, noise, k)
    torch.testing.assert_close(schedule.convert(v, x_t, t, "v", "x0").float(), x0, atol=1e-5, rtol=0)
    assert float(schedule.alpha(torch.tensor(1.0))) == pytest.approx(float(scheduler.alphas_cumprod[-1].sqrt()), abs=1e-8)


def test_flow_agrees_with_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule, kind = from_scheduler(scheduler)
    assert kind == "velocity"
    scheduler.set_timesteps(10)
    k = scheduler.timesteps[3:4]
    x0, noise = torch.randn(1, 4), torch.randn(1, 4)
    torch.testing.assert_close(schedule.add_noise(x0, noise, schedule.from_model_time(k)), scheduler.scale_noise(x0, k, noise))


def test_ddim_step_agrees_with_diffusers() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    schedule, _ = from_scheduler(scheduler)
    scheduler.set_timesteps(10)
    x, eps = torch.randn(2, 3), torch.randn(2, 3)
    k, following = scheduler.timesteps[4], scheduler.timesteps[5]
    t, s = (schedule.from_model_time(v).expand(2) for v in (k, following))
    mine = schedule.ddim(x, schedule.convert(eps, x, t, "eps", "x0").float(), t, s)
    torch.testing.assert_close(mine, scheduler.step(eps, k, x).prev_sample, atol=1e-6, rtol=1e-6)


def test_renoise_has_the_right_law() -> None:
    """From x_s to x_t: the mean is scaled by alpha_t/alpha_s and the total noise is sigma_t."""
    schedule = CASES["sd"]
    torch.manual_seed(0)
    s, t = (torch.full((200_000,), v, dtype=torch.float64) for v in (0.3, 0.7))
    x_s = schedule.add_noise(torch.ones(200_000, 1), torch.randn(200_000, 1), s)
    x_t = schedule.renoise(x_s, torch.randn(200_000, 1), s, t)
    assert float(x_t.mean()) == pytest.approx(float(schedule.alpha(t[0])), abs=5 * float(schedule.sigma(t[0])) / math.sqrt(200_000))
    assert float(x_t.std()) == pytest.approx(float(schedule.sigma(t[0])), rel=0.01)


def test_table_ends_at_data() -> None:
    schedule = TabulatedVP(torch.linspace(0.99, 0.0, 10))
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 1.0]))
    assert alpha.tolist() == [1.0, pytest.approx(0, abs=1e-12)] and sigma.tolist() == [0.0, 1.0]


def test_unknown_schedules_are_refused() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.register_to_config(prediction_type="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        from_scheduler(scheduler)
