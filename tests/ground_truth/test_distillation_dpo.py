"""What ``distill verify distillation_dpo`` checks, and the ranking."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from distill.denoiser import Condition
from distill.errors import UserError
from distill.methods.base import Batch
from distill.methods.distillation_dpo import DistillationDPO
from distill.verify import any_method, distillation_dpo


def one_for_all(images: torch.Tensor, inputs: Sequence[Any]) -> torch.Tensor:
    """No score for each."""
    return images.mean()


def test_the_resting_point() -> None:
    results = list(distillation_dpo.checks())
    assert sum(c.must_fail for c in results) == 2
    assert all(c.passed for c in results), results


def test_holds_for_any_method() -> None:
    assert all(c.passed for c in any_method.checks("distillation_dpo", DistillationDPO()))


def test_ranking() -> None:
    """One of each pair wins, the larger one; a tie is a toss-up."""
    method = DistillationDPO(metric=distillation_dpo.LARGER)
    roles = any_method.toy_roles(method)
    roles.decode = lambda x: x
    x = torch.tensor([[1.0], [5.0], *[[7.0]] * 1000, [2.0], [4.0], *[[7.0]] * 1000])
    wins = method._wins(roles, Batch(x, Condition()), x)
    first, second = wins.chunk(2)
    assert first[:2].tolist() == [False, True] and torch.equal(first, ~second)
    assert 400 < int(first[2:].sum()) < 600


def test_a_metric_gives_one_score_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    method = DistillationDPO(metric=distillation_dpo.LARGER)
    roles, x = any_method.toy_roles(method), torch.randn(4, 2)
    roles.decode = lambda x: x
    monkeypatch.setattr(distillation_dpo, "larger", one_for_all)
    with pytest.raises(UserError, match="one score for each"):
        method._wins(roles, Batch(x, Condition()), x)


def test_pairs_share_their_condition() -> None:
    labels = torch.arange(6)
    batch = DistillationDPO(second_noise=3.0)._pairs(Batch(torch.randn(6, 4000), Condition({"class_labels": labels}), inputs=list(range(6)), group=labels))
    assert batch.inputs == list(range(6)) * 2 and batch.condition.values["class_labels"].tolist() == list(range(6)) * 2  # type: ignore[union-attr]
    assert float(batch.noise[6:].std()) == pytest.approx(3.0, rel=0.05) and batch.group is not None and len(batch.group) == 12


@pytest.mark.parametrize("settings", [{"objective": "sid"}, {"metric": "nowhere:function"}, {"critic_steps": {"lag": 0.5}}, {"beta": -1.0}])
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        DistillationDPO(**settings)  # type: ignore[arg-type]
