"""The cache of encoded prompts and images: what is on disk is not encoded again, and what is damaged is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_stable_diffusion

from distill.config import Data
from distill.data import cache, encoded
from distill.data.cache import fingerprint
from distill.data.loader import load_data
from distill.denoiser import Condition, cat
from distill.errors import UserError
from distill.teacher import Teacher

PROMPTS = ["a red apple", "a green car", "a photograph of a cat", "blue", "a cat"]


class Counting(Teacher):
    """Counts what it encodes."""

    def __init__(self, pipeline: Any, fails_after: int = 10**6) -> None:
        self.encoded: list[Any] = []
        self.fails_after = fails_after
        super().__init__(pipeline)

    def condition(self, inputs: Any, negative: Any = None) -> Any:
        self.encoded += list(inputs)
        if len(self.encoded) > self.fails_after:
            raise KeyboardInterrupt
        return super().condition(inputs, negative)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += [None] * len(images)
        return super().encode(images)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 2)
    monkeypatch.setattr(encoded, "ENCODE_BATCH", 2)


def prompts(folder: Path, lines: list[str] = PROMPTS, **settings: Any) -> Data:
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
    return Data(source="prompts", path=folder / "prompts.txt", cache_folder=folder / "cache", **settings)


def test_the_second_run_encodes_nothing(tmp_path: Path) -> None:
    first, second, plain = (Counting(tiny_stable_diffusion()) for _ in range(3))
    a = load_data(prompts(tmp_path), first, False)
    assert first.encoded == PROMPTS
    b = load_data(prompts(tmp_path), second, False)
    assert second.encoded == []
    c = load_data(prompts(tmp_path, cache=False), plain, False)
    for step in range(3):
        of_a, of_b, of_c = (data.batch(step, 4)[1] for data in (a, b, c))
        assert of_a.null is not None and of_b.null is not None and of_c.null is not None
        for name, value in of_c.values.items():
            assert torch.equal(of_a.values[name], of_b.values[name])  # type: ignore[arg-type]
            torch.testing.assert_close(of_a.values[name], value, atol=1e-6, rtol=0)
            torch.testing.assert_close(of_a.null[name], of_c.null[name], atol=1e-6, rtol=0)


def test_new_prompts_leave_whole_shards_alone(tmp_path: Path) -> None:
    load_data(prompts(tmp_path), Counting(tiny_stable_diffusion()), False)
    again = Counting(tiny_stable_diffusion())
    load_data(prompts(tmp_path, [*PROMPTS, "of"]), again, False)
    assert again.encoded == ["a cat", "of"]  # the last shard had one entry and now has two


def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_data(prompts(tmp_path), Counting(tiny_stable_diffusion()), False).batch(0, 5)[1]
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(shards) == 3
    content = shards[1].read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b""):  # truncated, one bit, empty
        shards[1].write_bytes(damaged)
        teacher = Counting(tiny_stable_diffusion())
        data = load_data(prompts(tmp_path), teacher, False)
        assert f"{shards[1]} is damaged" in capsys.readouterr().err and len(teacher.encoded) in (1, 2)
        assert shards[1].read_bytes() == content
        assert torch.equal(data.batch(0, 5)[1].values["encoder_hidden_states"], whole.values["encoder_hidden_states"])  # type: ignore[arg-type]


def test_an_interrupted_encoding_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_data(prompts(tmp_path), Counting(tiny_stable_diffusion(), fails_after=3), False)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1 and not list((tmp_path / "cache").rglob("*.tmp"))
    teacher = Counting(tiny_stable_diffusion())
    load_data(prompts(tmp_path), teacher, False)
    assert teacher.encoded == PROMPTS[2:]


def test_other_encoders_make_other_entries(tmp_path: Path) -> None:
    load_data(prompts(tmp_path), Counting(tiny_stable_diffusion()), False)
    pipeline = tiny_stable_diffusion()
    before = fingerprint([("text_encoder", pipeline.text_encoder)])
    with torch.no_grad():
        next(pipeline.text_encoder.parameters())[0, 0] += 1
    assert fingerprint([("text_encoder", pipeline.text_encoder)]) != before
    teacher = Counting(pipeline)
    load_data(prompts(tmp_path), teacher, False)
    assert teacher.encoded == PROMPTS


def test_images_are_encoded_once(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, text in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (40 * i, 10, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    section = Data(source="images", path=folder, cache_folder=tmp_path / "cache")
    first, second = Counting(tiny_stable_diffusion()), Counting(tiny_stable_diffusion())
    a, b = load_data(section, first, True), load_data(section, second, True)
    assert first.encoded.count(None) == 5 and second.encoded.count(None) == 0
    assert a.x0 is not None and b.x0 is not None and torch.equal(a.x0, b.x0) and a.x0.shape == (5, 4, 8, 8)
    Image.new("RGB", (16, 16), "white").save(folder / "4.png")  # another image under the same name
    third = Counting(tiny_stable_diffusion())
    load_data(section, third, True)
    assert third.encoded.count(None) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    section = prompts(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cache .* cannot be written .* set data.cache_folder"):
        load_data(section, Counting(tiny_stable_diffusion()), False)


class Ragged(Counting):
    """One prompt is encoded to another length than the others."""

    def condition(self, inputs: Any, negative: Any = None) -> Any:
        parts = [super(Ragged, self).condition([i], negative) for i in inputs]
        for i, text in enumerate(inputs):
            if text == PROMPTS[2]:
                parts[i] = Condition({k: v[:, :3] for k, v in parts[i].values.items()}, parts[i].null)  # type: ignore[index, call-overload]
        return cat(parts)


@pytest.mark.parametrize("shard", [1, 2])
def test_prompts_of_different_lengths_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    """Whether they meet in one shard or lie in different ones: none of them is lost."""
    monkeypatch.setattr(cache, "SHARD", shard)
    data = load_data(prompts(tmp_path), Ragged(tiny_stable_diffusion()), False)
    entries = [e for i in range(5) for e in data.batch(i, 1)[1].values["encoder_hidden_states"]]
    assert sorted(len(e) for e in entries) == [3, 16, 16, 16, 16]
