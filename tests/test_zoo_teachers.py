"""The universal teacher on pipelines of many families: what assets/teachers.json says is so."""

import importlib.util
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from zoo import CASES

from distill.teachers import checked

_SPEC = importlib.util.spec_from_file_location("check_teachers", Path(__file__).parent.parent / "tools" / "check_teachers.py")
assert _SPEC is not None and _SPEC.loader is not None
check_teachers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_teachers)

#: One for each thing that pipelines do differently; a second or two each.
QUICK = {
    "StableDiffusionXLPipeline": "added conditions",
    "StableDiffusion3Pipeline": "flow matching",
    "FluxPipeline": "packed tokens, embedded guidance, dynamic shift",
    "QwenImagePipeline": "two calls, shapes as lists, norm-preserving guidance",
    "ZImagePipeline": "lists of tensors, reversed time, negated answer, shifted guidance",
    "DiTPipeline": "the conditional half first, learnt variance",
    "PixArtSigmaPipeline": "masks",
    "Kandinsky3Pipeline": "shifted guidance that is off at one",
    "KandinskyV22CombinedPipeline": "a cascade",
    "StableDiffusionInpaintPipeline": "channels beside the state",
    "StableDiffusionControlNetPipeline": "another network's answers",
    "TextToVideoSDPipeline": "frames as rows of the scheduler's sample",
    "WanPipeline": "video",
    "StableCascadePriorPipeline": "a cosine schedule in continuous time",
    "ConsistencyModelPipeline": "EDM's preconditioning",
    "QwenImage21Pipeline": "an override",
    "Cosmos2TextToImagePipeline": "a rectified flow under a scheduler that adds noise to the data; images of 8 bits",
    "SanaSprintPipeline": "a rectified flow under TrigFlow",
    "PRXPixelPipeline": "x0 turned into a velocity with a floor",
    "OmniGenPipeline": "time from noise to data, guidance that is never off, the conditional half first",
    "Cosmos3OmniPipeline": "one sample per call, one time per token",
    "UniDiffuserPipeline": "a state in two parts; a null condition of noise",
    "StableDiffusionAttendAndExcitePipeline": "attention maps that are read between the calls",
    "StableDiffusionParadigmsPipeline": "another method of the scheduler; students go home in another class",
    "HunyuanVideo15Pipeline": "guidance in a component",
    "Kandinsky6TI2VAPipeline": "two states",
    "ZImageControlNetPipeline": "a mapping with numbers for keys",
}
ROWS = {row["name"]: row for row in checked()}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    yield
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_warning()


def agrees(name: str) -> None:
    row = check_teachers.check(CASES[name])
    assert row["result"] == ROWS[name]["result"], row


@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_kind(name: str) -> None:
    assert ROWS[name]["result"] != "no"
    agrees(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(QUICK)))
def test_all_others(name: str) -> None:
    agrees(name)


def test_the_table_is_of_all_cases_and_most_of_them_work() -> None:
    assert set(ROWS) == set(CASES)
    for tasks, share in ((("text-to-image", "class-to-image"), 0.95), (tuple({c.task for c in CASES.values()}), 0.85)):
        rows = [r for r in ROWS.values() if r["task"] in tasks]
        works = [r for r in rows if r["result"] != "no"]
        assert len(works) >= share * len(rows), [r["name"] for r in rows if r not in works]
    trained = [r for r in ROWS.values() if r["task"] in ("text-to-image", "class-to-image") and r["result"] != "no"]
    away = [r["name"] for r in trained if not r["trained"] or r["exported"] not in ("stock scheduler", "few-step pipeline")]
    assert len(away) <= 0.02 * len(trained), away
    assert sum(r["result"] != "no" for r in ROWS.values()) >= 150
    assert all(r.get("why") for r in ROWS.values() if r["result"] == "no")
