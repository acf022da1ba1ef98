"""What ``distill verify`` checks of the methods that are the consistency engine with settings."""

import importlib

import pytest

from distill.methods import available
from distill.verify import any_method, ect, made, mlcm, pcm, rg_lcd, scm, scott, tcm, tscd
from distill.verify.core import Check

METHODS = ["ict", "ect", "pcm", "scm", "tscd", "tbcm", "sana_sprint", "rcm", "mlcm", "scott", "tcm", "rg_lcd"]


def passed(results: list[Check]) -> None:
    assert any(c.must_fail for c in results) and not all(c.must_fail for c in results)
    assert all(c.passed for c in results), [c for c in results if not c.passed]


@pytest.mark.parametrize("name", ["ict", "sana_sprint"])
def test_closed_forms(name: str) -> None:
    passed(list(importlib.import_module(f"distill.verify.{name}").checks()))


@pytest.mark.parametrize(
    "checks",
    [scm.tangent_checks, scm.guidance_checks, scm.limit_checks, scm.denoising_checks, ect.denoising_checks, pcm.adversary_checks, mlcm.state_checks,
     scott.fixed_point_checks, tcm.stage_checks, rg_lcd.preference_checks, rg_lcd.gradient_checks],
    ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}",
)
def test_what_needs_no_training(checks: object) -> None:
    passed(list(checks()))  # type: ignore[operator]


def test_without_ablations() -> None:
    assert all(c.passed for checks in (ect.gap_checks, pcm.exact_checks, scott.step_checks, tscd.end_checks) for c in checks())


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("ict", "sana_sprint")])
def test_trained(name: str) -> None:
    passed(list(importlib.import_module(f"distill.verify.{name}").checks()))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_holds_for_any_method(name: str) -> None:
    results = list(any_method.checks(name, made(name, available()[name])))
    assert all(c.passed for c in results), [c for c in results if not c.passed]


def test_one_step_of_each_reaches_its_roles() -> None:
    for name in METHODS:
        for progress in (0.0, 0.3, 0.9):
            assert not any(any_method.step_faults(made(name, available()[name]), progress).values()), name
