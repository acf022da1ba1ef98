"""The examples of docs/methods/extend.md: each one is short, is found by its import path, trains, and is refused with one line where it is wrong."""

import json
import re
from pathlib import Path

import pytest
import torch

from distill.config import load_config
from distill.errors import UserError
from distill.losses.divergence import divergence_weight
from distill.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("my_divergence", "my_discriminator", "my_term")
SHORT = ("trainer.steps=2", "trainer.batch_size=4", "trainer.sample_every=0", "trainer.log_every=1", "trainer.device=cpu")


def examples() -> dict[str, str]:
    text = (ROOT / "docs/methods/extend.md").read_text(encoding="utf-8")
    return {m[1]: m[2] for m in re.finditer(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with the page's files in it; it is the current one, and not on Python's path."""
    for name, text in examples().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend("nowhere")  # restores the path at the end
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_example_is_under_thirty_lines() -> None:
    found = examples()
    assert sorted(found) == sorted(f"{name}.{suffix}" for name in NAMES for suffix in ("py", "yaml"))
    assert all(text.count("\n") < 30 for text in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_train(name: str, folder: Path) -> None:
    config = load_config(f"{name}.yaml", SHORT)
    run = folder / "run"
    run.mkdir()
    trainer = Trainer(config, run)
    before = [p.detach().clone() for p in trainer.roles.parameters("discriminator")]
    trainer.fit()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(torch.isfinite(torch.tensor(v)) for row in rows for v in row.values())
    if name == "my_term":
        assert rows[0]["student/my_term:Contrast"] > 0
    if name == "my_discriminator":
        assert any(n.startswith("body.") for n in trainer.roles.named_parameters("discriminator"))
        assert all(not torch.equal(p, q) for p, q in zip(trainer.roles.parameters("discriminator"), before, strict=True))


def test_the_divergence_is_what_the_page_says(folder: Path) -> None:
    load_config("my_divergence.yaml")
    r = torch.linspace(0.1, 5, 20, dtype=torch.float64)
    torch.testing.assert_close(divergence_weight("my_divergence:alpha_half", r), r.sqrt())  # r² · r^(−3/2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.divergence=my_divergence:alpha", "my_divergence.*alpha"),
        ("method.gan.features=my_discriminator:OneScale", "my_discriminator.*OneScale"),
        ("method.gan.features=nowhere", "critic, teacher, random, projected or an import path"),
        ("method.terms=[{kind: my_term:Contrst}]", "my_term.*Contrst"),
        ("method.terms=[{kind: my_term:Contrast, powr: 1}]", "powr"),
        ("method.terms=[{kind: contrast}]", "there is no term 'contrast'"),
    ],
)
def test_mistakes_are_one_line(setting: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_config("my_divergence.yaml", [setting])
    assert "\n" not in str(error.value)
