"""The benchmarks' own arithmetic: what counts as collapsed, what equal cost is."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.analytic import AffineGenerator, gaussian
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.losses.divergence import RatioNormalizer
from distill.methods.base import Batch
from distill.methods.dmd2 import DMD2
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import train

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Loads one by its name; its own imports are found beside it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def written(folder: Path, **numbers: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"finite": True, "distance": 1.0, "coverage": 0.9, "spread": 1.0} | numbers))


def test_what_counts_as_collapsed(tool: Callable[[str], Any], tmp_path: Path) -> None:
    """One run for each reason, among ordinary ones: the median of the finite distances [1, 1, 1, 2.9, 3.1, 12, 1] is 1."""
    stability = tool("bench_stability")
    written(tmp_path / "start", distance=10.0)
    written(tmp_path / "teacher", distance=0.5)
    runs: list[dict[str, Any]] = [
        {}, {}, {}, {"distance": 2.9}, {"distance": 3.1}, {"distance": 12.0}, {"spread": 0.4}, {"finite": False, "distance": None, "coverage": 0.0},
    ]
    for factor in stability.FACTORS:
        for seed, numbers in enumerate(runs):
            written(stability.cell_path(tmp_path, "dmd2", factor, seed).parent, **numbers)
    rows, cells = stability.judge(tmp_path, ["dmd2"], range(9))
    why = [cells["dmd2", 1.0, s].collapsed for s in range(8)]
    assert why == [None, None, None, None, "outlier", "lost", "narrow", "not finite"]
    assert cells["dmd2", 1.0, 3].ratio == pytest.approx(5.8)
    assert [(r["runs"], r["median"], r["worst"], r["collapsed"]) for r in rows] == [(8, 1.0, 12.0, 4)] * 3
    assert "| dmd2 | ÷3 | 8 | 1 | 2.00 | 12 | 0.00 | 4 (lost, narrow, not finite, outlier) |" in stability.markdown(rows)


def test_the_heat_map_marks_collapse(tool: Callable[[str], Any]) -> None:
    """Light for the best, dark for the worst, a red frame around what has collapsed, and an empty box for what is missing."""
    heat = tool("heat_map")
    cells = [heat.Cell(1.0), heat.Cell(8.0, "narrow"), None]
    image = heat.draw({"dmd2": [("×1", cells)]}, ["0", "1", "2"], "distance")

    def at(row: int, x: int, y: int) -> Any:
        return image.getpixel((heat.LEFT + x, heat.TOP + row * heat.HIGH + y))

    inside = (heat.WIDE // 2, 10)  # above the number
    assert [at(i, *inside) for i in range(3)] == [heat.SCALE[0], heat.SCALE[-1], heat.PAPER]
    frame = (heat.WIDE // 2, 3)
    assert [at(i, *frame) for i in range(3)] == [heat.SCALE[0], heat.RED, heat.PAPER]


@pytest.mark.parametrize(("critic_steps", "steps"), [(1, 20), (5, 8)])
def test_equal_cost_is_equal_passes(tool: Callable[[str], Any], critic_steps: int, steps: int) -> None:
    """100 passes are 20 steps of 3 + 2 and 8 of 3 + 10 (the eighth begins at 91): the rates follow the passes, not the steps."""
    count_passes = tool("bench_runs").count_passes
    torch.manual_seed(0)
    schedule = CosineVP()
    student = AffineGenerator(schedule, (1.0,), (1.0,))
    critic = AffineGenerator(schedule, (1.0,), (1.0,))
    method = DMD2(critic_steps=critic_steps)
    roles = Roles(gaussian(schedule, (0.0,), (1.0,)), student, critic, state=method.initial_state())
    counted, seen = count_passes(roles), []

    def batch(step: int) -> Batch:
        seen.append(sum(counted.values()) / 400)
        return Batch(torch.randn(4, 1), Condition())

    train(method, roles, batch, 1000, {"student": 1e-3, "critic": 1e-3}, done=lambda: sum(counted.values()) / 400)
    assert len(seen) == steps
    assert seen == pytest.approx([i * (3 + 2 * critic_steps) / 100 for i in range(steps)])


def test_runs_side_by_side_are_runs_alone(tool: Callable[[str], Any]) -> None:
    """Three discriminators in one network answer as each does alone, and f-distill's weights of a run do not depend on the others' logits."""
    toys = tool("toys")
    torch.manual_seed(0)
    alone = [Discriminator({"state": (3,)}, hidden=16) for _ in range(3)]
    state, t = torch.randn(24, 3), torch.rand(24, dtype=torch.float64)
    logits = toys.together(alone)({"state": state}).detach()
    for i, network in enumerate(alone):
        assert torch.allclose(logits[i::3], network({"state": state[i::3]}), atol=1e-6)
    normalizer = RatioNormalizer()
    with toys.ratios_apart(3):
        weights = normalizer.weight("jensen_shannon", logits.flatten(), t, torch.ones(3, 10))
        other = logits.flatten().clone()
        other[1::3] += 3 * torch.randn(8)
        changed = normalizer.weight("jensen_shannon", other, t, torch.ones(3, 10))
    assert torch.allclose(weights[0::3], normalizer.weight("jensen_shannon", logits[0::3].flatten(), t[0::3], torch.ones(10)))
    assert torch.equal(weights[0::3], changed[0::3])
    assert not torch.allclose(weights[1::3], changed[1::3])


def test_recorded_runs_are_not_measured_again_unless_the_recipe_has_changed(tool: Callable[[str], Any], tmp_path: Path) -> None:
    methods, file, out = tool("bench_methods"), tmp_path / "methods.json", tmp_path / "out"
    fingerprint = tool("bench_runs").fingerprint
    same = fingerprint("sid/digits", [], 300, 5000)
    assert same == fingerprint("sid/digits", ["trainer.steps=1000"], 300.0, 5000)
    assert same not in (fingerprint("sid/digits", ["method.alpha=1.2"], 300, 5000), fingerprint("sid/digits", [], 60, 5000))
    for seed, distance in ((0, 0.2), (1, 0.3)):
        path = methods.result_of(out, "sid/digits", seed)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"fd_digits": distance}))
    methods.record(file, {"sid/digits": same}, out)
    recorded = json.loads(file.read_text())
    assert [(r["seed"], r["recipe"], r["numbers"]) for r in recorded] == [(0, same, {"fd_digits": 0.2}), (1, same, {"fd_digits": 0.3})]
    methods.restore(recorded, {"sid/digits": same}, tmp_path / "elsewhere")
    assert json.loads(methods.result_of(tmp_path / "elsewhere", "sid/digits", 1).read_text()) == {"fd_digits": 0.3}
    methods.restore(recorded, {"sid/digits": "another"}, tmp_path / "third")
    assert not (tmp_path / "third").exists()
