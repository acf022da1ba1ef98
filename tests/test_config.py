"""Recipes: strictness, overrides, and errors that point at the line."""

import json
from pathlib import Path

import pytest

from distill import yamltree
from distill.config import dump, load_config, recipe, recipes, schema
from distill.errors import UserError
from distill.methods.dmd2 import DMD2

RECIPE = """\
teacher:
  pipeline: assets/digits-teacher
method:
  name: dmd2
  critic_steps: 2
optimizers:
  student: {lr: 1e-4}
output:
  folder: runs/test
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_and_values(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert isinstance(config.method, DMD2) and config.method.critic_steps == 2
    assert config.optimizers.student.lr == 1e-4  # YAML 1.1 would read 1e-4 as a string
    assert config.optimizers.of("critic") == config.optimizers.student
    assert config.seed == 0 and config.student.weights == "full"


def test_overrides(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["method.gan.weight=0.5", "data={source: digits}", "seed=7", "trainer.batch_size=8"])
    assert isinstance(config.method, DMD2) and config.method.gan is not None and config.method.gan.weight == 0.5
    assert config.data.source == "digits" and config.seed == 7 and config.trainer.batch_size == 8


def test_the_resolved_recipe_reproduces_the_run(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["data.source=digits", "method.gan.r1=0.25", "method.divergence=jeffreys"])
    again = load_config(write(tmp_path, dump(config)))
    assert again.model_dump() == config.model_dump()
    assert dump(again) == dump(config)


@pytest.mark.parametrize(
    ("line", "broken", "message"),
    [
        (5, ("critic_steps: 2", "critic_step: 2"), "method.critic_step: unknown key; did you mean 'critic_steps'?"),
        (5, ("critic_steps: 2", "critic_steps: many"), "method.critic_steps: input should be a valid integer, not 'many'"),
        (5, ("critic_steps: 2", "critic_steps: true"), "method.critic_steps: input should be a valid integer, not True"),
        (5, ("critic_steps: 2", "critic_steps: 0"), "greater than or equal to 1, not 0"),
        (4, ("name: dmd2", "name: dmd22"), "method.name: there is no method 'dmd22'; did you mean 'dmd2'?"),
        (7, ("lr: 1e-4", "lr: -1"), "optimizers.student.lr"),
        (7, ("lr: 1e-4", "lr: 1e-4, momentum: 1"), "optimizers.student.momentum: unknown key"),
        (2, ("pipeline:", "pipelin:"), "teacher.pipelin"),
        (5, ("critic_steps: 2", "divergence: forward_kl"), "needs a density ratio"),
        (5, ("critic_steps: 2", "steps: 9"), "less than or equal to 8, not 9"),
        (5, ("critic_steps: 2", "times: [0.9, 0.4]"), "times must be 1 descending numbers"),
        (3, ("  critic_steps: 2", "  gan: {}"), "needs real images"),
    ],
)
def test_mistakes_name_file_line_and_key(tmp_path: Path, line: int, broken: tuple[str, str], message: str) -> None:
    path = write(tmp_path, RECIPE.replace(*broken))
    with pytest.raises(UserError) as caught:
        load_config(path)
    text = str(caught.value)
    assert message in text and "\n" not in text
    if "needs real images" not in message and "times" not in message and "ratio" not in message:
        assert text.startswith(f"{path}:{line}: "), text


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data={source: images}", "needs a path"),
        ("data={source: images, path: /nowhere/images}", "does not exist"),
        ("data={source: digits, path: /tmp}", "takes no path"),
        ("trainer.mixed_precision=fp16", "fp16 needs a CUDA device"),
        ("student={lora: {rank: 4}}", "student.weights is full"),
        ("student={weights: lora, lora: {rank: 0}}", "greater than or equal to 1"),
        ("student={weights: lora, train: [mid_block]}", "student.train: chooses among full weights"),
        ("student={weights: lora, architecture: {num_layers: 2}}", "student.architecture: needs weights of its own"),
        ("student={freeze: [conv_in], architecture: {num_layers: 2}}", "student.freeze: shares what is frozen"),
        ("student={train: []}", "at least 1 item"),
        ("student={architecture: {}}", "at least 1 item"),
        ("student={ema: 0, ema_dtype: bfloat16}", "student.ema is 0"),
        ("student={ema: 0, ema_device: cpu}", "student.ema is 0"),
        ("student.ema_dtype=float16", "'float32' or 'bfloat16'"),
        ("student.lora.dora=1", "valid boolean"),
        ("trainer={offload: true, gradient_checkpointing: yes, compile: true}", "does not go with trainer.compile"),
        ("trainer.attention=flash", "flash needs a CUDA device"),
        ("trainer.attention=xformers", "xformers is not installed|xformers needs a CUDA device"),
        ("optimizers.critic={name: adamw8bit}", "optimizers.critic.name: adamw8bit needs"),
        ("output.export=[lora]", "cannot be exported as a LoRA"),
        ("evaluate.steps=[1, 2]", "samples in at most 1 steps, not 2"),
        ("trainer.steps=-5", "greater than or equal to 1, not -5"),
        ("seed=1.5", "valid integer, not 1.5"),
        ("nonsense", "write it as section.key=value"),
        ("seed.x=1", "seed: input should be a valid integer"),
        ("method.name=nowhere:Method", "nowhere"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load_config(write(tmp_path), [assignment])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["student={weights: lora}", "trainer.offload=true"], "trainer.offload: finds nothing to move"),
        (["teacher.quantize=8bit", "student={weights: lora, lora: {dora: true}}"], "DoRA does not work on 8-bit layers"),
        (["teacher.quantize=4bit", "student.train=[mid_block]"], "teacher.quantize: quantises weights that the student's frozen layers share"),
        (["teacher.quantize=4bit", "trainer.offload=true"], "quantised weights stay on the device"),
        (["teacher.quantize=4bit", "trainer.compile=true"], "quantised layers are not compiled"),
        (["teacher.quantize=3bit"], "teacher.quantize: input should be 'none', '8bit', '4bit', 'int8', 'int4' or 'float8'"),
    ],
)
def test_impossible_pairs_are_refused(tmp_path: Path, assignments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path), assignments)


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for assignment in ("teacher.quantize=4bit", "optimizers.student.name=adamw8bit"):
        with pytest.raises(UserError, match=r"needs bitsandbytes, which is not installed: pip install 'distill-diffusion\[quantization\]'"):
            load_config(write(tmp_path), [assignment])
    with pytest.raises(UserError, match="xformers is not installed"):
        load_config(write(tmp_path), ["trainer.attention=xformers"])


def test_yaml_that_is_no_recipe(tmp_path: Path) -> None:
    for text, message in (("a: [", "not valid YAML"), ("- 1", "mapping of sections"), ("seed: 1\nseed: 2", "given twice")):
        with pytest.raises(UserError, match=message):
            load_config(write(tmp_path, text))
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load_config(tmp_path / "recipe.yaml")


def test_lines_and_numbers() -> None:
    tree, lines = yamltree.parse("a:\n  b: [1, 2e3, -1e-4, 5, 0.5, .5, 007]\n  c: no\n", "x")
    assert tree == {"a": {"b": [1, 2000.0, -1e-4, 5, 0.5, 0.5, 7], "c": False}}
    assert lines[("a", "b")] == 2 and lines[("a", "c")] == 3


def test_schema_lists_the_methods() -> None:
    text = json.dumps(schema())
    assert '"dmd2"' in text and '"consistency"' in text and '"discretization"' in text


def test_every_shipped_recipe_is_valid() -> None:
    assert "quickstart" in recipes()
    for name in recipes():
        load_config(name)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        recipe("quickstrat")
