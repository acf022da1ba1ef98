"""What ``distill verify instarevive`` checks, and the settings of the scope."""

import pytest
import torch

from distill.matching.times import Scope, Times
from distill.methods.distribution import DistributionMatching
from distill.methods.instarevive import InstaRevive
from distill.verify import any_method, instarevive


def test_the_scope_knows_the_way() -> None:
    results = list(instarevive.checks())
    assert sum(c.must_fail for c in results) == 2
    assert all(c.passed for c in results), results


def test_holds_for_any_method() -> None:
    assert all(c.passed for c in any_method.checks("instarevive", InstaRevive()))


def test_the_reference_is_a_running_quantile() -> None:
    scope, reference = Scope(quantile=0.5, memory=0.75), torch.zeros(())
    scope.below((0.0, 1.0), torch.tensor([1.0, 2.0, 3.0]), reference)
    assert float(reference) == 2.0
    bounds = scope.below((0.2, 1.0), torch.tensor([0.0, 1.25, 6.0, 9.0, 6.0]), reference)
    assert float(reference) == pytest.approx(0.75 * 2 + 0.25 * 6)
    assert bounds.tolist() == pytest.approx([0.2, 0.2 + 0.8 * 1.25 / 3, 1.0, 1.0, 1.0])


def test_a_scope_against_data_needs_images_and_is_for_the_score_alone() -> None:
    scoped = Times(scope=Scope(against="data"))
    assert DistributionMatching(score_times=scoped).needs_images() and not InstaRevive().needs_images()
    with pytest.raises(ValueError, match="scope is for score_times"):
        DistributionMatching(critic_times=scoped)
