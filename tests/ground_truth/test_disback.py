"""What ``distill verify disback`` checks; the stages; and that the recorded teachers survive a checkpoint."""

from pathlib import Path

import pytest
import torch

from distill.config import load_config
from distill.methods.disback import DisBack
from distill.trainer import Trainer
from distill.verify import any_method, disback


def test_a_far_student_comes_home() -> None:
    results = list(disback.checks())
    assert sum(c.must_fail for c in results) == 2
    assert all(c.passed for c in results), results


def test_holds_for_any_method() -> None:
    assert all(c.passed for c in any_method.checks("disback", DisBack()))


def test_stages() -> None:
    """Recording, then T_3, T_2, T_1 in equal shares, then the teacher."""
    method = DisBack(teachers=4, recording=0.2, backtracking=0.3)
    assert [method.stage(p) for p in (0.0, 0.19, 0.2, 0.29, 0.31, 0.41, 0.49, 0.51, 0.99)] == [4, 4, 3, 3, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"recording": 0.5, "backtracking": 0.5}, "take all"), ({"guidance_scale": 2.0}, "critic_null"), ({"teachers": 1}, "greater than or equal to 2")],
)
def test_impossible_settings(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DisBack(**settings)  # type: ignore[arg-type]


RECIPE = """\
teacher: {pipeline: assets/digits-teacher}
student: STUDENT
method: {name: disback, teachers: 3, recording: 0.3, critic_steps: 1}
trainer: {steps: 10, batch_size: 2, device: cpu}
output: {folder: FOLDER}
"""


@pytest.mark.parametrize("student", ["{weights: full}", "{weights: lora, lora: {rank: 2}}"])
def test_a_resumed_run_follows_the_recorded_teachers(tmp_path: Path, student: str) -> None:
    """Stopped while it goes back: the same losses as without a stop. With LoRA what is recorded is the adapter."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("STUDENT", student).replace("FOLDER", str(tmp_path / "run")))
    whole = Trainer(load_config(recipe), tmp_path / "run")
    before = {k: v.clone() for k, v in whole.roles.state.items()}
    losses = []
    for step in range(7):
        if step == 5:
            whole.save(5)
        losses.append({k: float(v) for k, v in whole.step(step).items()})
    assert ["student/loss" in values for values in losses] == [False] * 3 + [True] * 4
    assert {k.split("/")[0] for k in before} == {"recorded", "teacher_1", "teacher_2"}
    trained = {f"teacher_2/{k}": v.numel() for k, v in whole.roles.named_parameters("critic").items()}
    assert {k: v.numel() for k, v in before.items() if k.startswith("teacher_2/")} == trained
    assert any(not torch.equal(before[k], whole.roles.state[k]) for k in trained)
    again = Trainer(whole.config, tmp_path / "run", resume=True)
    assert again.start == 5
    assert [{k: float(v) for k, v in again.step(step).items()} for step in (5, 6)] == losses[5:]
