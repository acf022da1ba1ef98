"""The recipes of the adversarial methods and the terms: each trains two steps of its own teacher, and changes what it says it changes."""

import json
from pathlib import Path

import pytest
import torch

from distill.config import load_config
from distill.trainer import Trainer

SHORT = ("trainer.steps=2", "trainer.batch_size=20", "trainer.sample_every=0", "trainer.log_every=1", "trainer.device=cpu")
PAIRS = ("method.pairs.count=20", "method.pairs.steps=2")


def trained(recipe: str, folder: Path, *settings: str) -> tuple[Trainer, dict[str, torch.Tensor], list[dict[str, float]]]:
    """(the trainer after two steps, the student as it was, the log)."""
    trainer = Trainer(load_config(recipe, (*SHORT, *settings)), folder)
    before = {n: p.detach().clone() for n, p in trainer.parts.student.denoiser.backbone.named_parameters()}
    trainer.fit()
    return trainer, before, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("recipe", "settings", "logged"),
    [
        ("dmd/digits", PAIRS, {"student/regression", "critic/loss"}),
        ("el/digits", (), {"student/embedding", "critic/loss"}),
        ("el/digits", (*PAIRS, "method.real=teacher", "data.source=none"), {"student/embedding"}),
        ("teacher_feature_drifting/digits", (), {"student/drifting"}),
        ("ladd/digits", PAIRS, {"student/gan", "discriminator/accuracy"}),
        ("asd/digits", ("method.steps=2", "method.times=[0.4,0.2]", "evaluate.steps=[1,2]"), {"critic/loss"}),
        ("tdm/digits", (), {"critic/loss", "student/score_gap"}),
    ],
)
def test_the_recipes_train(recipe: str, settings: tuple[str, ...], logged: set[str], tmp_path: Path) -> None:
    trainer, before, rows = trained(recipe, tmp_path, *settings)
    assert len(rows) == 2 and logged <= rows[0].keys() | rows[1].keys()
    assert all(torch.isfinite(torch.tensor(v)) for row in rows for v in row.values())
    changed = [n for n, p in trainer.parts.student.denoiser.backbone.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) > 0.8 * len(before)
    assert (trainer.pairs is not None) == (recipe[:4] in ("dmd/", "ladd") or "method.real=teacher" in settings)
    assert all(p.grad is None for p in trainer.parts.teacher.backbone.parameters())


def test_gdd_leaves_the_frozen_convolutions_alone(tmp_path: Path) -> None:
    trainer, before, rows = trained("gdd/digits", tmp_path)
    after = dict(trainer.parts.student.denoiser.backbone.named_parameters())
    convolutions = [n for n in before if ".conv1." in n or ".conv2." in n]
    assert convolutions and all(torch.equal(after[n], before[n]) for n in convolutions)
    others = [n for n in before if n not in convolutions]
    assert sum(not torch.equal(after[n], before[n]) for n in others) > 0.8 * len(others)
    share = sum(before[n].numel() for n in convolutions) / sum(p.numel() for p in before.values())
    assert 0.3 < share < 0.95 and "discriminator/accuracy" in rows[0] and not any(k.startswith("critic") for k in rows[0])


def test_a_resumed_run_sees_the_pairs_that_it_would_have_seen(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
    settings = (*SHORT[1:], *PAIRS, "trainer.steps=3", "trainer.checkpoint_every=1", "optimizers.student.decay=constant", "optimizers.critic.decay=constant")
    Trainer(load_config("dmd/digits", settings), whole).fit()
    first = Trainer(load_config("dmd/digits", settings), parted)
    first.step(0)
    first.save(1)
    Trainer(load_config("dmd/digits", settings), parted, resume=True).fit()
    a, b = ({r["step"]: r for r in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())} for f in (whole, parted))
    assert a[2]["student/regression"] == b[2]["student/regression"] and a[2]["critic/loss"] == b[2]["critic/loss"]
