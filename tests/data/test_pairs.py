"""The teacher's samples that are made before training: what they are, and that they are made once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import tiny_unet2d, vp_scheduler

from distill.config import Data
from distill.data import pairs
from distill.data.loader import load_data
from distill.data.pairs import make_pairs
from distill.errors import UserError
from distill.methods.base import PairsWanted
from distill.teacher import Teacher

WANTED = PairsWanted(count=7, steps=None, guidance_scale=2.0)


class Counting(Teacher):
    """Counts the samples that it makes."""

    def __init__(self, pipeline: Any, fails_after: int = 10**6) -> None:
        self.made, self.fails_after = 0, fails_after
        super().__init__(pipeline)

    def sample(self, condition: Any, noise: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        if self.made + len(noise) > self.fails_after:
            raise KeyboardInterrupt
        self.made += len(noise)
        return super().sample(condition, noise, *arguments, **settings)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SHARD", 3)


def made(teacher: Teacher, folder: Path | None, wanted: PairsWanted = WANTED, **settings: Any) -> pairs.PairData:
    return make_pairs(teacher, load_data(Data(source="none"), teacher, False), wanted, 2, folder, batch_size=2, **settings)


def test_a_pair_is_unit_noise_and_what_the_teachers_own_sampler_makes_of_it(tmp_path: Path) -> None:
    teacher = Counting(tiny_unet2d())
    batch = made(teacher, tmp_path).batch(0, 7)
    torch.testing.assert_close(teacher.sample(batch.condition, batch.noise, 2, 2.0), batch.x0, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(teacher.sample(batch.condition, batch.noise, 2, 1.0), batch.x0, atol=1e-3)
    labels = batch.condition.values["class_labels"]
    assert isinstance(labels, torch.Tensor) and labels.tolist() == list(batch.inputs) and len(set(batch.inputs)) == 7
    many = torch.stack([torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(k)) for k in range(300)])
    assert float(many.std()) == pytest.approx(1, abs=0.02) and torch.equal(batch.noise.sum((1, 2, 3)).sort().values, many[:7].sum((1, 2, 3)).sort().values)


def test_the_second_run_makes_none_and_an_interrupted_one_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(Counting(tiny_unet2d(), fails_after=5), tmp_path)
    second, third = Counting(tiny_unet2d()), Counting(tiny_unet2d())
    a = made(second, tmp_path).batch(0, 7)
    assert second.made == 4  # the first shard of three was whole
    b = made(third, tmp_path, seed=1).batch(0, 7)
    assert third.made == 0
    key = a.noise.sum((1, 2, 3)).argsort(), b.noise.sum((1, 2, 3)).argsort()
    assert torch.equal(a.x0[key[0]], b.x0[key[1]]) and not torch.equal(a.noise, b.noise)  # another run's order
    plain = made(Counting(tiny_unet2d()), None).batch(0, 7)
    torch.testing.assert_close(plain.x0, a.x0)


@pytest.mark.parametrize("change", ["guidance", "steps", "scheduler"])
def test_whatever_changes_a_sample_asks_for_others(change: str, tmp_path: Path) -> None:
    made(Counting(tiny_unet2d()), tmp_path)
    other = Counting(tiny_unet2d() if change != "scheduler" else tiny_unet2d(zero_snr=False))
    told = {"guidance": PairsWanted(7, None, 3.0), "steps": PairsWanted(7, 3, 2.0), "scheduler": WANTED}[change]
    made(other, tmp_path, told)
    assert other.made == 7


def test_a_damaged_shard_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = made(Counting(tiny_unet2d()), tmp_path).batch(0, 7)
    shard = sorted(tmp_path.rglob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")
    again = Counting(tiny_unet2d())
    b = made(again, tmp_path).batch(0, 7)
    assert again.made in (1, 3) and torch.equal(a.x0, b.x0) and str(shard) in capsys.readouterr().err


def test_processes_share_them(tmp_path: Path) -> None:
    teachers = [Counting(tiny_unet2d()) for _ in range(2)]
    parts = [made(teacher, tmp_path, process=(rank, 2)) for rank, teacher in enumerate(teachers)]
    assert [t.made for t in teachers] == [len(p) for p in parts] == [4, 3]
    noises = torch.cat([p.batch(0, len(p)).noise for p in parts])
    whole = made(last := Counting(tiny_unet2d()), tmp_path).batch(0, 7)
    assert last.made == 0 and torch.equal(noises.sum((1, 2, 3)).sort().values, whole.noise.sum((1, 2, 3)).sort().values)
    assert len(made(Counting(tiny_unet2d()), tmp_path, process=(4, 5))) == 3  # fewer shards than processes: some share one


def test_a_sampler_with_noise_of_its_own_pairs_nothing(tmp_path: Path) -> None:
    pipeline = tiny_unet2d()
    pipeline.scheduler = vp_scheduler("v_prediction", cls=DDPMScheduler)
    with pytest.raises(UserError, match="DDPMScheduler draws more at each step"):
        made(Teacher(pipeline), tmp_path)
    assert len(made(Teacher(pipeline), tmp_path, PairsWanted(4, None, 1.0, paired=False))) == 4
