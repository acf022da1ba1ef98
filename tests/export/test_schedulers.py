"""The stock scheduler of a student: which one is taken, and that plausible wrong ones are not."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from tiny import tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_student, vp_scheduler

from distill.export import assembly
from distill.export.calls import plain_call
from distill.export.rehearsal import Rehearsal
from distill.export.schedulers import NoStockScheduler, Stock, betas_of, choose, shift_of, unshift
from distill.student import Student


def chosen(student: Student) -> Stock:
    return choose(student, lambda scheduler: assembly.assemble(student, student.denoiser.backbone, scheduler))


def wrong(student: Student, scheduler: Any, steps: int, **extra: Any) -> str | None:
    """What the rehearsal says of a scheduler."""
    pipeline = assembly.assemble(student, student.denoiser.backbone, scheduler)
    plain = {**plain_call(student, pipeline), **{k: v for k, v in extra.items() if k == "guidance_scale"}}
    return Rehearsal(student).disagreement(pipeline, plain, steps, {k: v for k, v in extra.items() if k not in plain})[0]


@pytest.mark.parametrize(("make", "times", "gamma", "name", "default_call"), [
    (tiny_stable_diffusion, (1.0, 0.75, 0.5, 0.25), 1.0, "LCMScheduler", {}),
    (tiny_stable_diffusion, (1.0, 0.9, 0.2), 1.0, "LCMScheduler", {"timesteps": [999, 899, 199]}),
    (tiny_stable_diffusion, (1.0, 0.5), 0.0, "DDIMScheduler", {}),
    (tiny_stable_diffusion, (1.0, 0.75, 0.5, 0.25), 0.0, "TCDScheduler", {}),
    (tiny_stable_diffusion, (0.999, 0.666, 0.333), 0.3, "TCDScheduler", {"eta": 0.3}),
    (tiny_dit, (1.0, 0.5), 1.0, "LCMScheduler", {}),
    (tiny_sd3, (1.0, 0.75, 0.5, 0.25), 1.0, "FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    (tiny_sd3, (1.0, 0.6), 0.0, "FlowMapEulerDiscreteScheduler", {}),
])
def test_the_scheduler_is_found(make: Any, times: tuple[float, ...], gamma: float, name: str, default_call: dict[str, Any]) -> None:
    stock = chosen(tiny_student(make(), times, len(times), gamma=gamma))
    assert type(stock.scheduler).__name__ == name
    assert {k: pytest.approx(v) for k, v in default_call.items()} == stock.calls[len(times)]
    assert stock.calls.keys() == set(range(1, len(times) + 1))
    assert stock.generator_used is (make is tiny_stable_diffusion)
    assert stock.plain == {"guidance_scale": 1.0}


def test_a_shift_is_found_from_the_ladder() -> None:
    """t = s u / (1 + (s − 1) u) with u = 1 − i/N; passed sigmas are shifted again by diffusers, and so passed unshifted."""
    assert shift_of((1.0, 0.9, 0.75, 0.5)) == pytest.approx(3.0)
    assert unshift(0.9, 3.0) == pytest.approx(0.75)
    stock = chosen(tiny_student(tiny_sd3(), (1.0, 0.9, 0.75, 0.5), gamma=0.0))
    assert stock.scheduler.config.shift == pytest.approx(3.0)
    assert stock.calls[4] == {} and stock.calls[3]["sigmas"] == pytest.approx([1.0, 0.75, 0.5])


def test_traps_are_told_apart() -> None:
    """Each of these configurations looks right and is not: the rehearsal names the first difference."""
    student = tiny_student(tiny_stable_diffusion(), steps=4)
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    assert wrong(student, LCMScheduler(**table, original_inference_steps=4), 4) is None
    assert wrong(student, LCMScheduler(**table), 4) == "step 2 is at timestep 759, not 749"  # original_inference_steps: 50
    assert "differs" in str(wrong(student, LCMScheduler(beta_start=0.0009, beta_end=0.012, original_inference_steps=4), 4))
    assert "the last step differs" in str(wrong(student, TCDScheduler(**table, original_inference_steps=4), 1, eta=1.0))  # ends above clean data
    flow = tiny_student(tiny_sd3(), (1.0, 0.9, 0.75, 0.5))
    stochastic = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    assert wrong(flow, stochastic, 4, sigmas=[1.0, 0.75, 0.5, 0.25]) is None
    assert str(wrong(flow, stochastic, 4, sigmas=[1.0, 0.9, 0.75, 0.5])).startswith("step 2 is at timestep 964")  # shifted again
    assert "the state at step 2" in str(wrong(flow, FlowMatchEulerDiscreteScheduler(shift=3.0), 4, sigmas=[1.0, 0.75, 0.5, 0.25]))


def test_any_table_of_noise_levels_can_be_written() -> None:
    """A beta schedule that LCMScheduler does not know travels as trained_betas."""
    student = tiny_student(tiny_stable_diffusion(scheduler=DDPMScheduler(beta_schedule="sigmoid", clip_sample=False)), steps=2)
    scheduler = chosen(student).scheduler
    assert len(scheduler.config.trained_betas) == 1000
    assert torch.allclose(scheduler.alphas_cumprod, student.teacher.pipeline.scheduler.alphas_cumprod, atol=1e-6)
    products = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    assert torch.allclose(torch.cumprod(1 - torch.tensor(betas_of(products), dtype=torch.float64), 0), products)


def test_a_teachers_own_few_step_scheduler_is_kept() -> None:
    """An LCM teacher's grid of 50: its students keep its scheduler, and name the timesteps that it would not choose."""
    teacher = tiny_stable_diffusion(scheduler=vp_scheduler(cls=LCMScheduler))
    stock = chosen(tiny_student(teacher, (1.0, 0.76, 0.5, 0.26)))
    assert stock.scheduler.config.original_inference_steps == 50
    assert stock.calls == {1: {}, 2: {}, 3: {"timesteps": [999, 759, 499]}, 4: {}}


def test_no_scheduler_fits() -> None:
    student = tiny_student(tiny_stable_diffusion(), (1.0, 0.12345), 2)
    with pytest.raises(NoStockScheduler, match="at its times 1, 0.12345 .*use --to few-step"):
        chosen(student)
    student = tiny_student(tiny_sd3(), (1.0, 0.5), 2, gamma=0.5)
    with pytest.raises(NoStockScheduler):
        chosen(student)
