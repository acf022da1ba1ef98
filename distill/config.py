"""The YAML schema: one strict tree. Every mistake is refused before anything is loaded, with file, line and nearest key."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, create_model

from distill import yamltree
from distill.errors import UserError
from distill.methods import available, find_method
from distill.methods.base import Method
from distill.resources import find, resource

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Patterns = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]  #: names, globs or re:… (see selection.py)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Teacher(Section):
    """The pipeline to distill."""

    pipeline: str  #: a folder, a hub id (owner/model) or a shipped asset
    steps: Positive = 50  #: of its own sampler, where it is compared with the student
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  #: where it is compared; what the student learns is method.guidance_scale
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  #: of its weights, and of all networks' arithmetic; what is trained is kept in float32
    #: its frozen weights, with bitsandbytes (8bit, 4bit) or torchao (int8, int4, float8); with LoRA the student's backbone is this one
    quantize: Literal["none", "8bit", "4bit", "int8", "int4", "float8"] = "none"
    revision: str | None = None
    variant: str | None = None
    trust_remote_code: bool = False
    call: dict[str, str | int | float | bool] = {}  #: further arguments of the pipeline's call, the same for every sample: height, width, …
    override: str | None = None  #: module:NAME of a distill.overrides.Override: what probing cannot infer


class LoRA(Section):
    """Adapters on the teacher's backbone."""

    rank: Positive = 64
    alpha: Annotated[float, Field(gt=0)] | None = None  #: strength = alpha / rank; equal to the rank if not given
    targets: Annotated[list[str], Field(min_length=1)] | None = None  #: layer names; every linear and convolution inside the blocks if not given
    dora: bool = False  #: also train the magnitude of each layer's rows (DoRA)


class Student(Section):
    """What is trained."""

    weights: Literal["full", "lora"] = "full"
    lora: LoRA | None = None
    train: Patterns | None = None  #: of full weights: the parameters to train, all others frozen and shared with the teacher
    freeze: Patterns | None = None  #: of full weights: parameters not to train
    #: settings of the backbone's config that make the student smaller, such as {num_layers: 6}
    architecture: Annotated[dict[str, Any], Field(min_length=1)] | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999  #: decay of the averaged weights that are sampled and exported; 0 for none
    ema_dtype: Literal["float32", "bfloat16"] = "float32"  #: bfloat16 is rounded at random, right on average
    ema_device: Literal["same", "cpu"] = "same"  #: where the averaged weights are kept


class Critic(Section):
    """The network that follows the student's own distribution, where the method has one."""

    #: same: as the student is, a copy beside full weights or an adapter beside a LoRA; lora: an adapter on the teacher's own
    #: backbone beside a student with full weights (VSD, SwiftBrush): two networks in place of three
    weights: Literal["same", "lora"] = "same"
    lora: LoRA | None = None


class Data(Section):
    """What training sees."""

    source: Literal["digits", "emoji", "images", "prompts", "none"] = "none"
    path: Path | None = None  #: of images (a folder) or prompts (a text or JSONL file)
    split: Literal["train", "all"] = "train"
    cache: bool = True  #: keep encoded prompts and latents on disk, for the next run
    cache_folder: Path | None = None  #: $DISTILL_CACHE or ~/.cache/distill if not given


class Optimizer(Section):
    name: Literal["adamw", "adam", "radam", "sgd", "adamw8bit"] = "adamw"
    lr: Rate = 1e-5
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 10.0  #: largest gradient norm; 0 for no clipping
    warmup: Annotated[int, Field(ge=0)] = 0  #: steps of linear warm-up
    decay: Literal["constant", "linear", "cosine"] = "constant"  #: of the learning rate, to zero at the last step


class Optimizers(Section):
    """One per role. A role without a section uses the student's."""

    student: Optimizer = Optimizer()
    critic: Optimizer | None = None
    discriminator: Optimizer | None = None

    def of(self, role: str) -> Optimizer:
        own = self.critic if role == "winner" else getattr(self, role, None)  # a second critic trains as the first
        return own or self.student


class Trainer(Section):
    steps: Positive = 10_000  #: student updates
    batch_size: Positive = 32  #: samples per micro-batch and process
    accumulate: Positive = 1  #: micro-batches per update
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    #: of float32 networks; those of a half-precision teacher compute in its dtype, float16 as with fp16. (YAML reads no as false.)
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)] = "no"
    compile: bool = False  #: torch.compile the backbones
    gradient_checkpointing: bool = False  #: compute activations again in the backward pass: less memory, about a third slower
    offload: bool = False  #: the teacher's (and target's) weights wait on the CPU between uses; no effect where the device is the CPU
    batched_roles: bool = False  #: one call for teacher and critic together, where adapters share a backbone: more memory
    attention: Literal["default", "sdpa", "flash", "xformers"] = "default"  #: the kernel of the backbones' attention
    log_every: Positive = 20
    sample_every: Annotated[int, Field(ge=0)] = 500  #: steps between sample grids; 0 for none
    sample_inputs: Annotated[list[str | int], Field(min_length=1)] | None = None  #: prompts or classes of the grid
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2


class Evaluate(Section):
    """What is measured at the end, on the exported student and on the teacher, from equal noise."""

    metrics: list[str] = []  #: none: no evaluation
    samples: Positive = 5000
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  #: of that noise; apart from the run's seed, so that runs compare
    batch_size: Positive = 250
    steps: list[Positive] | None = None  #: numbers of student steps; the method's own if not given
    prompts: Path | None = None  #: for text pipelines: a file of prompts


class Output(Section):
    folder: Path
    export: list[Literal["diffusers", "few-step", "lora", "lora-kohya"]] = ["diffusers"]  #: what beside student/, see docs/export.md


class Config(Section):
    """A training run."""

    teacher: Teacher
    student: Student = Student()
    critic: Critic = Critic()
    method: SerializeAsAny[Method]
    data: Data = Data()
    optimizers: Optimizers = Optimizers()
    trainer: Trainer = Trainer()
    evaluate: Evaluate = Evaluate()
    output: Output
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def load_config(name: str | Path, overrides: Sequence[str] = (), anywhere: bool = False) -> Config:
    """Read, override and check a recipe.

    Args:
        name: a YAML file, or the name of a shipped recipe (``quickstart``, ``consistency/digits``).
        overrides: assignments ``a.b=value``.
        anywhere: the recipe is to be run on another machine: do not ask whether this one can.

    Raises:
        UserError: one line: ``file:line: key: what is wrong``.
    """
    path = recipe(name)
    tree, lines = yamltree.read(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections (teacher, student, method, …)")
    set_on_command_line = {yamltree.override(tree, assignment) for assignment in overrides}

    def where(key: yamltree.KeyPath) -> str:
        if any(key[: len(o)] == o for o in set_on_command_line):
            return "--set"
        while key and key not in lines:
            key = key[:-1]
        return f"{path}:{lines.get(key, 1)}"

    def refuse(problems: Sequence[tuple[yamltree.KeyPath, str]]) -> None:
        if problems:
            key, message = problems[0]
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            dotted = ".".join(map(str, key))
            raise UserError(f"{where(key)}: {dotted + ': ' if dotted else ''}{message}{more}")

    model, problem = _model_for(tree)
    refuse(problem)
    assert model is not None
    try:
        config = model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        # A misspelt key is also a missing one: say the spelling first.
        found = sorted(_of_the_meant_kind(tree, error.errors(include_url=False)), key=lambda e: e["type"] != "extra_forbidden")
        refuse([_explain(model, e) for e in found])
        raise
    refuse([problem for problem in _impossible(config) if not (anywhere and _of_this_machine(*problem))])
    return config


def recipe(name: str | Path) -> Path:
    """The file of a recipe, given by path or by the name of a shipped one."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    for candidate in (f"configs/{name}.yaml", f"configs/{name}", str(name)):
        found = find(candidate)
        if found.is_file():
            return found
    known = recipes()
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"shipped recipes: {', '.join(known)}"
    raise UserError(f"there is no recipe {name}: {hint}")


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    root = resource("configs")
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def dump(config: Config) -> str:
    """The resolved recipe as YAML: every setting, also those left at their defaults."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    methods = tuple(available().values())
    union: Any = Union[methods] if len(methods) > 1 else methods[0]  # noqa: UP007 - built at run time
    section: Any = Annotated[union, Field(discriminator="name")]
    return create_model("Recipe", __base__=Config, method=(section, ...)).model_json_schema()


# -- errors -------------------------------------------------------------------------------------------------------------


def _model_for(tree: dict[str, Any]) -> tuple[type[Config] | None, list[tuple[yamltree.KeyPath, str]]]:
    """The config class with the section type of the method that the recipe names."""
    section = tree.get("method")
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        given = "method" in tree
        return None, [(("method",) if given else (), f"{'' if given else 'method '}needs a name: one of {', '.join(available())}")]
    name = section["name"]
    try:
        method = find_method(name)
    except KeyError as error:
        close = difflib.get_close_matches(name, available(), 1)
        reason = str(error.args[0]) if ":" in name else f"there is no method {name!r}"
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(available())}"
        return None, [(("method", "name"), reason + ("" if ":" in name else hint))]
    if ":" in name:  # a method of the user's own goes by its import path
        method = create_model(method.__name__, __base__=method, name=(str, name))
    return create_model("Config", __base__=Config, method=(method, ...)), []


def _of_the_meant_kind(tree: Any, errors: Sequence[Any]) -> list[Any]:
    """The errors with key paths of the recipe. Where a setting may be a number or a section, pydantic reports what is wrong with
    it as either, under names of its own in the path: of these, what it was meant to be is kept."""
    kept = []
    for error in errors:
        node, path, meant = tree, [], True
        for i, key in enumerate(error["loc"]):
            absent = error["type"] == "missing" and i == len(error["loc"]) - 1
            if isinstance(node, dict) and (key in node or absent) or isinstance(node, list) and isinstance(key, int):
                path.append(key)
                node = node[key] if isinstance(node, list) or key in node else None
            else:  # a name of pydantic's: that of a section's class, or of a plain type
                meant &= str(key)[:1].isupper() == isinstance(node, dict)
        if meant:
            kept.append({**error, "loc": tuple(path)})
    return kept or list(errors)


def _explain(model: type[BaseModel], error: Any) -> tuple[yamltree.KeyPath, str]:
    """(key path, plain words) of one pydantic error."""
    path = tuple(error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _keys_at(model, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, 1, cutoff=0.5)
        return path, "unknown key" + (f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}")
    if kind == "missing":
        return path, "is missing"
    message = error["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type"):
        return path, "should be a section of keys"
    given = error.get("input")
    shown = "" if isinstance(given, dict | list) or kind == "value_error" else f", not {given!r}"
    return path, message[0].lower() + message[1:] + shown


def _keys_at(model: Any, path: Sequence[str | int]) -> list[str]:
    for key in path:
        if isinstance(model, type) and issubclass(model, BaseModel) and key in model.model_fields:
            model = _section_of(model.model_fields[str(key)].annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _section_of(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return next((_section_of(a) for a in get_args(annotation) if isinstance(_section_of(a), type)), annotation)
    return annotation


def _of_this_machine(key: yamltree.KeyPath, message: str) -> bool:
    """Whether a problem is what this machine lacks, and no fault of the recipe."""
    lacks = ("there is no CUDA device", "needs a CUDA device", "none is used here", "not installed", "cannot be written")
    return any(words in message for words in lacks)


def _impossible(config: Config) -> Iterator[tuple[yamltree.KeyPath, str]]:
    """Combinations that no run can satisfy, found without loading anything."""
    import torch

    from distill.evaluate.metrics import check_metric
    from distill.impossible import impossible_critic, impossible_memory, impossible_student

    method, data = config.method, config.data
    if method.needs_images() and data.source in ("none", "prompts"):
        yield ("data",), (
            f"method {method.name} as set here needs real images, and source {data.source!r} has none: "
            "set data.source to images or digits" + (", or leave out method.gan" if hasattr(method, "gan") else "")
        )
    if data.source in ("images", "prompts"):
        if data.path is None:
            yield ("data",), f"source {data.source!r} needs a path"
        elif not data.path.expanduser().exists():
            yield ("data", "path"), f"{data.path} does not exist"
    elif data.path is not None:
        yield ("data", "path"), f"source {data.source!r} takes no path"
    if config.student.weights == "lora" and method.guidance_embedding():
        yield ("method", "guidance_range"), "a LoRA student cannot be given a guidance embedding: fix guidance_scale, or set student.weights: full"
    yield from impossible_student(config)
    yield from impossible_critic(config)
    yield from impossible_memory(config)
    if config.student.weights == "full" and config.student.lora is not None:
        yield ("student", "lora"), "is set, but student.weights is full: set weights: lora, or leave it out"
    if any(form.startswith("lora") for form in config.output.export) and config.student.weights == "full":
        yield ("output", "export"), "a student with full weights cannot be exported as a LoRA: set student.weights: lora"
    if any(form.startswith("lora") for form in config.output.export) and method.experts() is not None:
        yield ("output", "export"), "a student of several networks is no single LoRA: use few-step"
    longest = len(method.sampler().times)
    for steps in config.evaluate.steps or ():
        if steps > longest:
            yield ("evaluate", "steps"), f"the student of this method samples in at most {longest} steps, not {steps}"
    for metric in config.evaluate.metrics:
        if metric == "fid":  # it would fail for want of a reference, after training
            yield ("evaluate", "metrics"), "fid needs real images to compare with: leave it out here, and use distill eval RUN --metrics fid --reference FOLDER"
        try:
            check_metric(metric)
        except UserError as error:
            yield ("evaluate", "metrics"), str(error)
    trainer = config.trainer
    if trainer.device == "cuda" and not torch.cuda.is_available():
        yield ("trainer", "device"), "there is no CUDA device here: set device: auto or cpu"
    if trainer.mixed_precision == "fp16" and (trainer.device in ("cpu", "mps") or not torch.cuda.is_available()):
        yield ("trainer", "mixed_precision"), "fp16 needs a CUDA device, and none is used here: set mixed_precision: no or bf16"
    if config.teacher.dtype == "float16" and trainer.mixed_precision == "bf16":
        yield ("trainer", "mixed_precision"), "bf16 does not go with a float16 teacher: set teacher.dtype: bfloat16, or mixed_precision: fp16"
    if config.teacher.dtype == "float16" and not torch.cuda.is_available():
        yield ("teacher", "dtype"), "float16 needs a CUDA device, and there is none here: use float32 or bfloat16"
    folder = config.output.folder.expanduser()
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield ("output", "folder"), f"{folder} cannot be written: {existing} is {'not a folder' if not existing.is_dir() else 'read-only'}"
