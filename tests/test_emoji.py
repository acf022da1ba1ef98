"""The emoji teacher, its data and its metrics, as they ship."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from distill.config import Data
from distill.data.emoji import SHAPE, load_emoji, load_emoji_rows
from distill.data.loader import load_data
from distill.errors import UserError
from distill.evaluate.emoji import cosines, emoji_clip, fd_emoji, load_features, word_ids
from distill.evaluate.generate import Images, generate
from distill.loading import load_pipeline
from distill.resources import resource
from distill.teacher import Teacher

TEACHER = "assets/emoji-teacher"
MB = 1_000_000


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline(TEACHER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def real(pipeline) -> Images:
    """96 real training emoji, through the autoencoder."""
    latents, captions = load_emoji("train")
    every = len(captions) // 96
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents[::every][:96] / pipeline.vae.config.scaling_factor).sample
    return Images((decoded / 2 + 0.5).clamp(0, 1), captions[::every][:96], 0.0, 0.0)


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_what_ships_is_small():
    assert folder_size(resource(TEACHER)) < 24 * MB
    assert folder_size(resource("assets/emoji")) < 8 * MB
    assert resource("assets/emoji-features.safetensors").stat().st_size < 4 * MB


# -- the data -----------------------------------------------------------------------------------------------------------


def without_variant(caption: str) -> str:
    """A caption without skin tone, gender and direction: written apart from the rule that made the split."""
    caption = re.sub(r",? (?:medium-)?(?:light|dark|medium) skin tone(?: and (?:medium-)?(?:light|dark|medium) skin tone)?", "", caption)
    caption = re.sub(r" facing (?:left|right)", "", caption)
    return re.sub(r"\b(?:wo)?m[ae]n\b|\bpersons?\b|\bpeople\b", "person", caption)


def test_no_variant_of_a_training_emoji_is_held_out():
    train, heldout = load_emoji_rows("train"), load_emoji_rows("heldout")
    assert (len(train), len(heldout)) == (3557, 224)
    for key in (lambda row: row["base"], lambda row: without_variant(row["caption"]), lambda row: row["key"]):
        assert not {key(row) for row in train} & {key(row) for row in heldout}
    plain = {re.sub("-(?:1f3f[b-f])", "", row["code"]) for row in train}
    assert not plain & {re.sub("-(?:1f3f[b-f])", "", row["code"]) for row in heldout}


def test_held_out_captions_are_made_of_known_words():
    bases = Counter()
    words_of: dict[str, set[str]] = {}
    for row in load_emoji_rows("train"):
        words_of.setdefault(row["base"], set()).update(re.findall("[a-z]+|[0-9]", row["caption"]))
    for words in words_of.values():
        bases.update(words)
    rare = {word for row in load_emoji_rows("heldout") for word in re.findall("[a-z]+|[0-9]", row["caption"]) if bases[word] < 3}
    assert not rare


def test_latents_fit_captions_and_scale():
    latents, captions = load_emoji("train")
    assert latents.shape == (len(captions), *SHAPE) and latents.dtype == torch.float32
    assert latents.std().item() == pytest.approx(1, abs=0.01) and abs(latents.mean().item()) < 0.3
    everything, names = load_emoji("all")
    assert len(everything) == len(names) == 3781
    with pytest.raises(ValueError, match="unknown split"):
        load_emoji("test")  # type: ignore[arg-type]


# -- the teacher --------------------------------------------------------------------------------------------------------


def test_captions_go_through_the_shipped_tokenizer(pipeline):
    tokenizer = pipeline.tokenizer
    assert len(tokenizer) == pipeline.text_encoder.config.vocab_size and tokenizer.model_max_length == 24
    assert tokenizer.tokenize("Orange  heart") == ["orange</w>", "heart</w>"]
    assert tokenizer.unk_token_id not in tokenizer("zyxqw 7 é", add_special_tokens=False).input_ids  # every byte is known
    ids = tokenizer("orange heart", padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(ids)[0]
        conditional, unconditional = pipeline.encode_prompt("orange heart", "cpu", 1, True)
        empty = pipeline.text_encoder(tokenizer("", padding="max_length", max_length=24, return_tensors="pt").input_ids)[0]
    assert torch.allclose(conditional, expected, atol=1e-5) and torch.allclose(unconditional, empty, atol=1e-5)
    assert (conditional - unconditional).abs().mean() > 0.05
    longest = max((row["caption"] for row in load_emoji_rows("all")), key=len)
    assert len(tokenizer(longest).input_ids) <= 24


def test_guidance_makes_images_fit_their_captions(pipeline):
    captions = [row["caption"] for row in load_emoji_rows("train")][::56]
    made = {scale: generate(pipeline, captions, steps=10, guidance_scale=scale, batch_size=64) for scale in (1.0, 3.0)}
    uncaptioned = generate(pipeline, [""] * len(captions), steps=10, guidance_scale=1.0, batch_size=64)
    scores = [float(emoji_clip(Images(x.images, captions, 0.0, 0.0), None)["emoji_clip"]) for x in (uncaptioned, made[1.0], made[3.0])]
    assert scores[1] > scores[0] + 0.1 and scores[2] > scores[1], scores
    assert (made[3.0].images - made[1.0].images).abs().mean() > 0.02


# -- the metrics --------------------------------------------------------------------------------------------------------


def test_metrics_know_real_emoji_from_noise_and_captions_from_others(real):
    assert fd_emoji(real, None)["fd_emoji"] * 5 < fd_emoji(Images(torch.rand(96, 3, 64, 64), real.inputs, 0.0, 0.0), None)["fd_emoji"]
    network = load_features(resource("assets/emoji-features.safetensors"))
    table = cosines(network, real.images, real.inputs)
    own, others = table.diagonal().mean().item(), (table.sum() - table.trace()).item() / (96 * 95)
    assert own > others + 0.3
    assert emoji_clip(real, None)["emoji_clip"] == pytest.approx(own, abs=1e-5)


def test_words_fall_into_fixed_buckets():
    assert word_ids("") == [0] and word_ids("Orange heart") == word_ids("orange, HEART!")
    assert all(1 <= i < 8192 for i in word_ids("a b c 12"))


def test_metrics_refuse_what_they_cannot_measure():
    digit = Images(torch.rand(4, 1, 8, 8), [0, 1, 2, 3], 0.0, 0.0)
    with pytest.raises(UserError, match="3×64×64"):
        fd_emoji(digit, None)
    with pytest.raises(UserError, match="too few"):
        fd_emoji(Images(torch.rand(1, 3, 64, 64), ["a"], 0.0, 0.0), None)
    with pytest.raises(UserError, match="takes no prompts"):
        emoji_clip(Images(torch.rand(2, 3, 64, 64), [None, None], 0.0, 0.0), None)


# -- recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # encodes all captions
def test_the_data_source_gives_latents_and_captions(pipeline):
    teacher = Teacher(pipeline)
    data = load_data(Data(source="emoji"), teacher, needs_images=True)
    x0, condition = data.batch(0, 4)
    assert x0 is not None and x0.shape == (4, *SHAPE) and len(data) == 3557
    assert next(iter(condition.values.values())).shape[0] == 4
    with pytest.raises(UserError, match="assets/emoji-teacher"):
        load_data(Data(source="emoji"), Teacher(load_pipeline("assets/digits-teacher")), needs_images=True)
