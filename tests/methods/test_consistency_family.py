"""The recipes of the consistency family train; what the engine refuses; how its parts fit together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distill.analytic import AffineGenerator, gaussian
from distill.cli import main
from distill.config import load_config
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.mapping.points import Trajectories, travelled
from distill.mapping.tangent import Tangent, leveled, normalized
from distill.matching.adversary import GAN
from distill.methods import find_method
from distill.methods.base import Batch
from distill.methods.consistency import Consistency
from distill.methods.distribution import DistributionMatching
from distill.methods.pcm import PCM
from distill.methods.rcm import RCM
from distill.methods.tbcm import TBCM
from distill.roles import Roles
from distill.schedule import CosineVP, Flow
from distill.trainer import Trainer

SHORT = ("trainer.steps=2", "trainer.batch_size=8", "trainer.sample_every=0", "trainer.log_every=1", "trainer.device=cpu")
RECIPES = {
    "ict/digits": {"student/gap"}, "ect/digits": {"student/gap"}, "tcm/digits": {"student/gap"}, "pcm/digits": {"student/gan", "discriminator/accuracy"},
    "tscd/digits": {"student/gap"}, "mlcm/digits": {"student/gap"}, "scott/digits": {"student/gan", "discriminator/loss"}, "scm/digits": {"student/tangent"},
    "sana_sprint/digits": {"student/tangent", "discriminator/accuracy"}, "tbcm/digits": {"student/tangent"},
    "rg_lcd/digits": {"student/proxy", "discriminator/loss"},
    "rcm/digits": {"student/score_gap", "critic/loss"},
}


@pytest.mark.parametrize(("recipe", "logged"), RECIPES.items())
def test_the_recipes_train(recipe: str, logged: set[str], tmp_path: Path) -> None:
    trainer = Trainer(load_config(recipe, SHORT), tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.parts.student.denoiser.backbone.named_parameters()}
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged <= rows[0].keys() | rows[1].keys() and all(torch.isfinite(torch.tensor(v)) for row in rows for v in row.values())
    changed = [n for n, p in trainer.parts.student.denoiser.backbone.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) > 0.8 * len(before)
    assert all(p.grad is None for p in trainer.parts.teacher.backbone.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("pcm", {"discretization": (50, 50)}, "use a multiple"),
        ("pcm", {"steps": 3}, "do not fit"),
        ("scm", {"target": "ema"}, "with the student's own weights"),
        ("scm", {"segments": [4], "discretization": (8, 8)}, "leave out gap and tangent"),
        ("scm", {"solver": "heun"}, "takes no step"),
        ("sana_sprint", {"gan": None}, "needs a gan section"),
        ("sana_sprint", {"gan": {"features": "teacher", "real": "target"}}, "needs a target"),
        ("tbcm", {"solver": "data"}, "has no teacher"),
        ("ect", {"segments": [2]}, "do not fall|leave out gap"),
        ("tcm", {"target": "ema"}, "set target to stop_gradient"),
        ("consistency", {"gan": {}}, "there is no critic"),
        ("consistency", {"times": [0.5, 1.0], "steps": 2}, "descending"),
        ("rcm", {"matching": {"gan": {}}}, "a difference of scores alone"),
        ("dmd2", {"gan": {"real": "target"}}, "of consistency methods"),
        ("scott", {"eta": 0.0}, "use solver ddim"),
    ],
)
def test_what_is_refused(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        find_method(name).model_validate({"name": name, **settings})


def test_samplers() -> None:
    """Phases sample without noise; consistency to the data with fresh noise; a truncated one at its own level."""
    assert PCM().sampler().gamma == 0 and PCM().sampler().ladder() == (1.0, 0.75, 0.5, 0.25)
    assert Consistency().sampler().gamma == 1 and find_method("tscd")(name="tscd").sampler().gamma == 0
    assert find_method("tcm")(name="tcm").sampler().times == (1.0, 0.5)


def test_what_needs_images() -> None:
    assert Consistency().needs_images() and not TBCM().needs_images()
    assert TBCM(gan=GAN(features="teacher")).needs_images()  # real ones, for the adversary


def test_the_ladder_of_the_score_difference_is_the_students() -> None:
    method = RCM(steps=3, matching=DistributionMatching(critic_steps=2), matching_from=0.5)
    assert method.score_matching(0.4) is None and method.roles == ("student", "critic")
    own = method.score_matching(0.6)
    assert own is not None and own.steps == 3 and tuple(own.times or ()) == method.sampler().times


def test_points_of_trajectories_lie_in_their_parts_and_keep_their_conditions() -> None:
    torch.manual_seed(0)
    teacher = gaussian(Flow(), (0.5,), (0.6,))
    labels = torch.arange(5)
    told = Condition({"class_labels": torch.zeros(5, dtype=torch.long), "label": labels})
    every = travelled(teacher, Trajectories(steps=4), torch.randn(5, 1), told)
    assert torch.equal((every.t.reshape(4, 5) * 4).floor()[:, 0], torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    assert torch.equal(every.condition.values["label"], labels.repeat(4))
    some = travelled(teacher, Trajectories(steps=4, points=2), torch.randn(5, 1), told)
    assert len(some.x_t) == 10 and all(len(set((some.t.reshape(2, 5)[:, i] * 4).floor().tolist())) == 2 for i in range(5))


def test_normalized_and_leveled() -> None:
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(normalized(g, 0.1)[0], g[0] * 2**0.5 / 5.1)
    assert torch.equal(normalized(g, None), g) and not bool(normalized(g, 0.1)[1].any())
    means = torch.zeros(2)
    out = leveled(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([0.1, 0.2, 1.5]), means, 0.5)
    torch.testing.assert_close(means, torch.tensor([3.0, 9.0]))
    torch.testing.assert_close(out, torch.tensor([2 / 3.1, 4 / 3.1, 9 / 9.1]))
    leveled(torch.tensor([5.0]), torch.tensor([0.1]), means, 0.5)
    torch.testing.assert_close(means, torch.tensor([4.0, 9.0]))


def test_strength_rises_and_calms_down() -> None:
    settings = Tangent(warmup=0.2, calm_down=(0.5, 0.2))
    assert [settings.strength(p) for p in (0.0, 0.1, 0.2, 0.5, 0.75, 1.0)] == pytest.approx([0, 0.5, 1, 1, 0.6, 0.2])


def test_the_adversary_of_phases_stays_within_them() -> None:
    """What is judged lies between the edge and the phase's upper end; fake and real alike."""
    torch.manual_seed(0)
    teacher, seen = gaussian(CosineVP(), (0.5, -0.3), (0.6, 0.9)), []

    class Noting(Discriminator):
        def forward(self, features: Any, told: Any = None) -> torch.Tensor:
            seen.append(features["state"][:, -1])
            return super().forward(features, told)

    roles = Roles(teacher, AffineGenerator(CosineVP(), (0.0, 0.0), (1.0, 1.0)), discriminator=Noting({"state": (3,)}))
    method = PCM(gan=GAN(features="teacher", layers=["state"], real="target"), segments=[2], steps=2, discretization=(2, 2))
    list(method.step(roles, Batch(torch.randn(64, 2), Condition(), teacher.sample(64))))
    student, both = seen
    assert int((student >= 0.5).sum()) == int((both[:64] >= 0.5).sum()) == 32  # as many as have t = 1: one draw from each 64th of [0, 1]
    assert len(both) == 128 and torch.equal(both[:64], both[64:])


@pytest.mark.parametrize("recipe", ["tscd/digits", "tbcm/digits"])
def test_a_plan_estimates_the_step(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in a step looks at values that a plan does not have; a derivative counts as another evaluation."""
    assert main(["plan", recipe]) == 0
    assert "not estimated" not in capsys.readouterr().out
