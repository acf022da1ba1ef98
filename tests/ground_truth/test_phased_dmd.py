"""What ``distill verify phased_dmd`` checks; the phases; settings that make no sense."""

from typing import Any

import pytest
import torch

from distill.analytic import GaussianMixture
from distill.denoiser import Condition
from distill.experts import ByTime
from distill.matching.critic import Adaptive
from distill.matching.terms import Embedding
from distill.methods.base import Batch
from distill.methods.phased_dmd import PhasedDMD
from distill.schedule import CosineVP
from distill.verify import any_method, phased_dmd


def test_the_closed_forms_hold_and_the_ablations_miss_them() -> None:
    results = list(phased_dmd.checks())
    assert sum(c.must_fail for c in results) == 3
    assert all(c.passed for c in results), [c for c in results if not c.passed]


def test_phases() -> None:
    method = PhasedDMD(steps=4, phases=2, shares=[3.0, 1.0])
    assert [method.phase(p) for p in (0.0, 0.74, 0.75, 1.0)] == [0, 0, 1, 1]
    assert method.stretch(0.1) == (0.0, 0.75) and method.stretch(0.8) == (0.75, 1.0)
    assert method.experts() == ByTime((1.0, 0.5)) and method.sampler().gamma == 0.0
    assert PhasedDMD(steps=3, phases=3, times=[1.0, 0.7, 0.2]).experts() == ByTime((1.0, 0.7, 0.2))
    assert PhasedDMD(steps=2, phases=1).experts() is None


def test_every_level_lies_above_the_samples_own() -> None:
    """t > s + margin for teacher and critic alike; in the last phase s = 0."""
    method = PhasedDMD(margin=0.05, critic_steps=1, phase_guidance=[1.0, 1.0])
    roles = any_method.toy_roles(method)
    assert roles.critic is not None
    asked: list[torch.Tensor] = []
    for network in (roles.teacher, roles.critic):
        predict = network.predict

        def noting(x_t: Any, t: Any, *rest: Any, predict: Any = predict) -> Any:
            asked.append(t)
            return predict(x_t, t, *rest)

        network.predict = noting  # type: ignore[method-assign]
    for progress, least in ((0.2, 0.55), (0.7, 0.0)):
        asked.clear()
        for _ in method.step(roles, Batch(torch.randn(64, 2), Condition({"class_labels": torch.zeros(64)}), progress=progress)):
            pass
        assert len(asked) == 3 and min(float(t.min()) for t in asked) >= least
        assert least > 0 or min(float(t.min()) for t in asked) < 0.05


def test_guidance_of_each_phase() -> None:
    teacher = GaussianMixture(CosineVP(), torch.tensor([[0.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.5], [0.5]]))
    label, null, gaps = torch.zeros(64, dtype=torch.long), torch.full((64,), 2), []
    for method in (PhasedDMD(phase_guidance=[1.0, 4.0], critic_steps=1), PhasedDMD(critic_steps=1)):
        roles = any_method.toy_roles(method, teacher)
        found = []
        for progress in (0.2, 0.7):
            torch.manual_seed(0)
            batch = Batch(torch.randn(64, 2), Condition({"class_labels": label}, {"class_labels": null}), progress=progress)
            found.append(float(next(iter(method.step(roles, batch)))[2]["score_gap"]))
        gaps.append(found)
    assert PhasedDMD(phase_guidance=[2.0, 4.0]).sampler().guidance_scale == 3.0
    assert gaps[0][0] == gaps[1][0] and gaps[0][1] != pytest.approx(gaps[1][1], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rollout": "trajectory"}, "leave out rollout"), ({"objective": "sid"}, "rollout"), ({"terms": [Embedding(kind="embedding")]}, "judge clean samples"),
        ({"critic_steps": Adaptive()}, "as a number"), ({"phases": 3}, "set steps to 3"), ({"shares": [1.0]}, "shares must be 2"),
        ({"times": [1.0, 0.97]}, "no room is left above"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PhasedDMD(**settings)
