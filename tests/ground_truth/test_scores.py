"""What ``distill verify`` checks of the methods that are score differences with settings, and what their settings refuse."""

import importlib

import pytest
import torch
from pydantic import ValidationError

from distill.methods.distribution import DistributionMatching
from distill.methods.sid import SiD
from distill.methods.sid_lsg import SiDLSG
from distill.methods.vsd import VSD
from distill.verify import any_method, made

METHODS = ["diff_instruct", "esd", "f_distill", "pg_sb", "sid", "sid_lsg", "sim", "uni_instruct", "vsd"]


@pytest.mark.parametrize("name", METHODS)
def test_closed_forms(name: str) -> None:
    results = list(importlib.import_module(f"distill.verify.{name}").checks())
    assert any(c.must_fail for c in results) and not all(c.must_fail for c in results)
    assert all(c.passed for c in results), [c for c in results if not c.passed]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_holds_for_any_method(name: str) -> None:
    from distill.methods import available

    results = list(any_method.checks(name, made(name, available()[name])))
    assert all(c.passed for c in results), [c for c in results if not c.passed]


def test_one_step_of_each_reaches_its_roles() -> None:
    from distill.methods import available

    for name in METHODS:
        assert not any(any_method.step_faults(made(name, available()[name])).values()), name


def test_alpha_moves_over_training() -> None:
    method = SiD(alpha=(1.0, 0.5))
    assert [method._alpha(p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.75, 0.5]
    assert SiD(alpha=1.2)._alpha(0.7) == 1.2


def test_what_is_refused() -> None:
    with pytest.raises(ValidationError, match="a guided critic must learn samples without their condition"):
        VSD(critic_null=0.0)
    with pytest.raises(ValidationError, match="needs one guidance_scale, not a range"):
        SiDLSG(guidance_scale=(1.0, 2.0))
    assert SiDLSG().critic_null == 0.0  # guided in its own loss, it needs none


def test_a_range_of_scales_is_one_draw_for_teacher_and_critic() -> None:
    """Teacher and critic the same network: guided by the same draw they agree, sample by sample."""
    torch.manual_seed(0)
    roles = any_method.toy_roles(DistributionMatching())
    roles.critic = roles.teacher
    batch = any_method.toy_batch(any_method.TEACHER, 32)
    method = DistributionMatching(guidance_scale=(0.5, 4.0), critic_guidance_scale="same", critic_null=0.1)
    _, loss, logs = next(iter(method.step(roles, batch)))
    assert float(logs["score_gap"]) == 0.0 and float(loss) == 0.0
