"""What ``distill verify sfd`` checks, and what SFD changes in a step: nothing but what the teacher is told."""

import pytest
import torch

from distill.denoiser import Condition
from distill.methods.base import Batch
from distill.methods.distribution import DistributionMatching
from distill.methods.sfd import SFD
from distill.methods.sid import SiD
from distill.roles import Roles
from distill.verify import any_method, sfd


def test_forgetting() -> None:
    results = list(sfd.checks())
    assert sum(c.must_fail for c in results) == 3
    assert all(c.passed for c in results), results


def test_holds_for_any_method() -> None:
    assert all(c.passed for c in any_method.checks("sfd", SFD()))


def losses(method: DistributionMatching) -> list[float]:
    torch.manual_seed(0)
    roles = any_method.toy_roles(method)
    batch = Batch(torch.randn(64, 2), Condition(), any_method.TEACHER.sample(64))
    torch.manual_seed(1)
    return [float(loss.detach()) for _, loss, _ in method.step(roles, batch)]


def test_with_nothing_to_forget_it_is_sid() -> None:
    assert losses(SFD()) == losses(SiD(score_times=(0.04, 0.71), alpha=1.0, critic_steps=5))


@pytest.mark.parametrize("instead", [7, [7, 8], None])
def test_who_is_told_what(instead: int | list[int] | None) -> None:
    """A share of the batch asks for 3; the teacher is told 7 (or 8, or nothing) there and in the data's own 3s alone."""
    n, null = 4000, torch.full((4000,), 10)
    method = SFD(forget=[3], instead=instead, share=0.25)
    labels = torch.arange(n) % 10
    extra = Condition({"class_labels": torch.tensor(method.extra_inputs())})
    roles = Roles(any_method.TEACHER, any_method.TEACHER, extra=extra)
    torch.manual_seed(0)
    batch = method._asked(roles, Batch(torch.randn(n, 1), Condition({"class_labels": labels}, {"class_labels": null}), inputs=labels.tolist()))
    student = batch.condition.values["class_labels"]
    teacher = method._reference(roles, batch)[1].values["class_labels"]
    assert isinstance(student, torch.Tensor) and isinstance(teacher, torch.Tensor)
    assert student.tolist() == list(batch.inputs)
    forgotten = student == 3
    assert float(forgotten.float().mean()) == pytest.approx(0.25 + 0.75 * 0.1, abs=0.02)
    assert torch.equal(teacher[~forgotten], student[~forgotten])
    given = {7: {7}, None: {10}}.get(instead, {7, 8}) if not isinstance(instead, list) else {7, 8}
    assert set(teacher[forgotten].tolist()) == given


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"instead": 8}, "set forget"),
        ({"forget": [3], "instead": 3}, "3 cannot be forgotten"),
        ({"forget": [3], "instead": 8, "gan": {"weight": 1.0}}, "teach it again"),
        ({"forget": [3], "instead": []}, "at least 1"),
    ],
)
def test_impossible_settings(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SFD(**settings)  # type: ignore[arg-type]
