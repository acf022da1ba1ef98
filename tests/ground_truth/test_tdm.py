"""What ``distill verify tdm`` checks of its own, and where the bounds of t meet."""

import pytest
import torch
from pydantic import ValidationError

from distill.analytic import gaussian
from distill.denoiser import Condition
from distill.matching.adversary import GAN
from distill.matching.rollout import roll_out
from distill.matching.times import Scope, TimeLaw, Times, draw_times
from distill.methods.base import Batch
from distill.methods.tdm import TDM
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify import tdm


def test_the_closed_forms_hold_and_the_ablations_miss_them() -> None:
    results = list(tdm.checks())
    assert any(c.must_fail for c in results) and all(c.passed for c in results), [c for c in results if not c.passed]


LAWS: list[TimeLaw] = [(0.02, 0.98), Times(law="logit_normal"), Times(law="log_sigma", mean=-1.0)]


@pytest.mark.parametrize("law", LAWS)
def test_both_bounds_of_t_hold_at_every_step(law: TimeLaw) -> None:
    for above, below in ((0.75, 1.0), (0.5, 0.75), (0.0, 0.25)):
        t = draw_times(law, torch.empty(500, 2), CosineVP(), above=torch.full((500,), above), below=torch.full((500,), below))
        low, high = max(above, 0.02 if isinstance(law, tuple) else 0.0), min(below, 0.98 if isinstance(law, tuple) else 1.0)
        assert low <= float(t.min()) < float(t.max()) <= high
        if isinstance(law, tuple):
            assert float(t.mean()) == pytest.approx((low + high) / 2, abs=1e-3)


def test_an_upper_bound_below_the_lower_one_leaves_the_lower_one() -> None:
    t = draw_times((0.02, 0.98), torch.empty(8, 2), CosineVP(), above=torch.full((8,), 0.6), below=torch.full((8,), 0.3))
    assert t.tolist() == pytest.approx([0.6] * 8)


@pytest.mark.parametrize("own", [True, False])
def test_own_ranges_end_where_the_step_began(own: bool) -> None:
    teacher = gaussian(CosineVP(), (0.0,), (1.0,))
    for step in range(4):
        odds = [float(i == step) for i in range(4)]
        method = TDM(own_ranges=own, step_odds=odds)
        batch = Batch(torch.randn(400, 1), Condition())
        sample = roll_out(teacher, "trajectory", method.sampler().times, batch.noise, batch.condition, odds=odds)
        for law in (method.score_times, method.critic_times):
            t = method._draw(law, Roles(teacher, teacher, teacher), batch, sample)
            assert float(t.min()) >= max(0.001, 0.75 - 0.25 * step)
            assert float(t.max()) == pytest.approx(min(1 - 0.25 * step, 1.0) if own else 1.0, abs=0.03)


def test_a_scope_narrows_own_ranges_further() -> None:
    """Samples at their goal are judged as low as their step allows; those far from it up to where the step began."""
    teacher = gaussian(CosineVP(), (0.0,), (1e-3,))  # its samples are all at 0, and so is what it makes of any
    method = TDM(own_ranges=True, score_times=Times(low=0.02, high=0.98, scope=Scope()), step_odds=[0.0, 0.0, 0.0, 1.0])
    roles, batch = Roles(teacher, teacher, teacher, state=method.initial_state()), Batch(torch.randn(400, 1), Condition())
    sample = roll_out(teacher, "trajectory", method.sampler().times, batch.noise, batch.condition, odds=method.step_odds)
    sample.x0[:200], sample.x0[200:] = 0.0, 1.0
    t = method._draw(method.score_times, roles, batch, sample)
    assert float(t[:200].max()) < 0.03 and 0.2 < float(t[200:].max()) <= 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout": "backward_simulation", "own_ranges": True}, "own_ranges are the steps' of rollout trajectory"),
        ({"gan": GAN()}, "rollout trajectory ends at a noise level"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TDM(**settings)  # type: ignore[arg-type]


def test_the_student_samples_as_it_was_trained() -> None:
    sampler = TDM().sampler()
    assert sampler.gamma == 0.0 and sampler.times == (1.0, 0.75, 0.5, 0.25) and sampler.steps == 4
