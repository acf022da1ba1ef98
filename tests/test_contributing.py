"""The example in CONTRIBUTING.md: one file and one recipe add a method that trains, exports and verifies."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def examples() -> dict[str, str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {m[1]: m[2] for m in re.finditer(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL)}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package with the example's files added, as the page says."""
    for name in ("distill", "configs", "pipelines", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in examples().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists()
        path.write_text(text, encoding="utf-8")
    return tmp_path


def run(checkout: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-m", "distill", *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_example_is_one_short_file_and_one_recipe() -> None:
    files = examples()
    assert sorted(files) == ["configs/ode_regression/digits.yaml", "distill/methods/ode_regression.py"]
    assert files["distill/methods/ode_regression.py"].count("\n") < 100


def test_the_example_works_as_the_page_says(checkout: Path) -> None:
    assert "ode_regression" in run(checkout, "methods")
    assert "teacher_steps" in run(checkout, "methods", "ode_regression")
    run(checkout, "train", "ode_regression/digits", "--set", "trainer.steps=20", "--set", "trainer.batch_size=32", "--set", "evaluate.samples=300")
    rows = json.loads((checkout / "runs/ode-regression/results.json").read_text())
    assert [row["steps"] for row in rows] == [50, 1] and rows[1]["fd_digits"] > rows[0]["fd_digits"] > 0
    metrics = [json.loads(line)["student/loss"] for line in (checkout / "runs/ode-regression/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1] < 0.8 * metrics[0]
    assert (checkout / "runs/ode-regression/student/unet2d.py").is_file()
    assert "0 failed" in run(checkout, "verify", "ode_regression")
