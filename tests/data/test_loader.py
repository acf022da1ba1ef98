"""Training data: order by step, encoded once, and what belongs together stays together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_stable_diffusion, tiny_unet2d

from distill.config import Data
from distill.data.digits import load_digits
from distill.data.images import list_folder, read_image
from distill.data.loader import TrainingData, load_data
from distill.data.prompts import read_prompts
from distill.errors import UserError
from distill.teacher import Teacher


def test_order_is_a_function_of_seed_and_step() -> None:
    teacher = Teacher(tiny_unet2d())
    x0, labels = torch.arange(23.0)[:, None, None, None].expand(-1, 1, 8, 8), [i % 10 for i in range(23)]
    one, two, other = (TrainingData(teacher, x0, labels, seed) for seed in (1, 1, 2))
    seen = [one.batch(i, 5) for i in range(12)]
    again, *_ = two.batch(7, 5)  # asked out of turn
    assert again is not None and seen[7][0] is not None and torch.equal(again, seen[7][0])
    numbers = torch.cat([x[:, 0, 0, 0] for x, *_ in seen if x is not None])
    assert sorted(numbers[:23].tolist()) == sorted(numbers[23:46].tolist()) == list(range(23))  # each once per epoch
    assert numbers[:23].tolist() != numbers[23:46].tolist()
    different, *_ = other.batch(0, 5)
    assert different is not None and seen[0][0] is not None and not torch.equal(different, seen[0][0])
    for x, condition, *_ in seen:
        assert x is not None and (condition.values["class_labels"] == (x[:, 0, 0, 0] % 10)).all()
        assert condition.null is not None and (condition.null["class_labels"] == 10).all()


def test_digits() -> None:
    images, labels = load_digits("train")
    held, _ = load_digits("heldout")
    assert len(images) + len(held) == 1797 and images.min() == -1 and images.max() == 1
    assert torch.bincount(labels).min() > 130  # stratified
    teacher = Teacher(tiny_unet2d())
    data = load_data(Data(source="digits"), teacher, True, seed=3)
    x0, condition, *_ = data.batch(0, 4)
    assert x0 is not None and x0.shape == (4, 1, 8, 8) and data.examples(3) == list(dict.fromkeys(labels.tolist()))[:3]
    assert not any((held == image).flatten(1).all(1).any() for image in images[:50])
    assert len(condition.values["class_labels"]) == 4


def save(path: Path, size: tuple[int, int] = (40, 20), mode: str = "RGB", value: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def test_captioned_images_are_encoded_once(tmp_path: Path) -> None:
    for i, caption in enumerate(["a red apple", "a blue car", "a red apple"]):
        save(tmp_path / f"{i}.png", value=60 * i)
        (tmp_path / f"{i}.txt").write_text(caption + "\n")
    teacher = Teacher(tiny_stable_diffusion())
    data = load_data(Data(source="images", path=tmp_path), teacher, True)
    assert data.inputs == ["a red apple", "a blue car", "a red apple"] and data.x0 is not None and data.x0.shape == (3, 4, 8, 8)
    x0, condition, *_ = data.batch(0, 3)
    expected = teacher.encode(torch.full((1, 3, 16, 16), 60 / 127.5 - 1))
    row = int((data.x0 - expected).abs().flatten(1).sum(1).argmin())
    assert row == 1 and x0 is not None and condition.values["encoder_hidden_states"].shape == (3, 16, 16)
    position = int((x0 - expected).abs().flatten(1).sum(1).argmin())
    torch.testing.assert_close(condition.values["encoder_hidden_states"][position], teacher.condition(["a blue car"]).values["encoder_hidden_states"][0])
    assert load_data(Data(source="images", path=tmp_path), teacher, False).batch(0, 2)[0] is None


def test_captions_from_lists(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.jpg")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"key": "a", "caption": "one"}) + "\n" + json.dumps({"file_name": "b.jpg", "text": "two"}) + "\n")
    assert list_folder(tmp_path, "prompt")[1] == ["one", "two"]
    (tmp_path / "captions.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"captions.jsonl:1"):
        list_folder(tmp_path, "prompt")
    (tmp_path / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=r"a.png has no caption: write it into a.txt"):
        list_folder(tmp_path, "prompt")


def test_classes_are_the_sub_folders(tmp_path: Path) -> None:
    for name in ("7", "2"):
        save(tmp_path / name / "x.png", mode="L")
    assert list_folder(tmp_path, "class_labels", 10)[1] == [2, 7]
    with pytest.raises(UserError, match="classes up to 7, but the teacher knows 0 to 4"):
        list_folder(tmp_path, "class_labels", 5)


def test_crop_scale_and_transparency(tmp_path: Path) -> None:
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[:, 8:32] = 255  # the centre is white
    Image.fromarray(picture).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", (3, 10, 10))
    assert image.shape == (3, 10, 10) and float(image.min()) > 0.98
    save(tmp_path / "clear.png", mode="RGBA", value=0)
    assert float(read_image(tmp_path / "clear.png", (3, 8, 8)).mean()) == 1.0  # transparent is white


def test_captions_as_people_write_them(tmp_path: Path) -> None:
    """Blank lines, a byte-order mark, a line separator inside a string, an empty caption; and what is refused."""
    for name in ("a.png", "b.png", "c.png", "._a.png", ".cache/d.png"):
        save(tmp_path / name)
    rows = [{"file_name": "a.png", "caption": "one\u2028two"}, {"file_name": "b.png", "caption": ""}]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "c.txt").write_text("three", encoding="utf-8-sig")
    paths, captions = list_folder(tmp_path, "prompt")
    assert [p.name for p in paths] == ["a.png", "b.png", "c.png"] and captions == ["one\u2028two", "", "three"]
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"c.txt is not a text file in UTF-8 \(byte 3\)"):
        list_folder(tmp_path, "prompt")
    (tmp_path / "captions.jsonl").write_text('{"caption": "of what?"}\n')
    with pytest.raises(UserError, match="captions.jsonl:1: has no file_name or key"):
        list_folder(tmp_path, "prompt")


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints", "cat", "dog"):
        save(tmp_path / name / "x.png", mode="L")
    assert list_folder(tmp_path, "class_labels", 10)[1] == [0, 1]
    save(tmp_path / "\u00b2" / "x.png", mode="L")  # a superscript two is a digit, but no number
    assert list_folder(tmp_path, "class_labels", 10)[1] == [0, 1, 2]


def test_turned_deep_and_huge_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lying, turned = Image.new("RGB", (16, 8)), Image.Exif()
    lying.paste((255, 255, 255), (0, 0, 8, 8))
    turned[0x0112] = 6  # "turn by 90 degrees to the right": the white left half becomes the upper one
    lying.save(tmp_path / "a.png", exif=turned)
    upright = read_image(tmp_path / "a.png", (3, 16, 8))
    assert (upright[:, :8] == 1).all() and (upright[:, 8:] == -1).all()
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(tmp_path / "deep.png")
    expected = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    torch.testing.assert_close(read_image(tmp_path / "deep.png", (1, 8, 8)), expected, atol=1 / 127, rtol=0)
    torch.testing.assert_close(read_image(tmp_path / "deep.png", (3, 8, 8)), expected.expand(3, 8, 8), atol=1 / 127, rtol=0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match="deep.png is not a readable image"):
        read_image(tmp_path / "deep.png", (1, 8, 8))


def test_a_broken_image_is_found_before_training(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", mode="L", value=50 * i)
    teacher = Teacher(tiny_unet2d(None))
    data = load_data(Data(source="images", path=tmp_path), teacher, True)
    assert data.x0 is not None and data.x0[:, 0, 0, 0].tolist() == pytest.approx([i * 50 / 127.5 - 1 for i in range(3)])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="1.png is not a readable image"):
        load_data(Data(source="images", path=tmp_path), teacher, True)


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n a car \n")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a car"]
    (tmp_path / "p.jsonl").write_text('{"caption": "one"}\n{"prompt": "two"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["one", "two"]
    (tmp_path / "p.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(UserError, match="p.jsonl:1: has no caption"):
        read_prompts(tmp_path / "p.jsonl")
    teacher = Teacher(tiny_stable_diffusion())
    x0, condition, *_ = load_data(Data(source="prompts", path=tmp_path / "p.txt"), teacher, False).batch(0, 3)
    assert x0 is None and len(condition.values["encoder_hidden_states"]) == 3
    with pytest.raises(UserError, match="takes no prompts"):
        load_data(Data(source="prompts", path=tmp_path / "p.txt"), Teacher(tiny_unet2d()), False)


def test_without_data_labels_are_even() -> None:
    data = load_data(Data(source="none"), Teacher(tiny_unet2d()), False)
    _, condition, *_ = data.batch(0, 40)
    assert torch.bincount(condition.values["class_labels"]).tolist() == [4] * 10
    assert load_data(Data(source="none"), Teacher(tiny_unet2d(None)), False).batch(0, 4)[1].values == {}
