"""A pipeline from its configuration files alone: no weights, no arithmetic, and yet it can be called.

Every network is built on PyTorch's meta device, where a tensor has a shape and a dtype but no memory. Its ``forward`` is
wrapped: arguments go to the meta device, the shapes of the outputs are computed there, and made-up values of those shapes
come back. So the pipeline's own ``__call__`` runs as it would in training, and ``Teacher`` learns its calling convention in
the same way, without a download and in seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from distill.call import Call
from distill.denoiser import Condition
from distill.errors import UserError
from distill.loading import SHIPPED_PIPELINES, _looks_like_hub_id, quiet, read_model_index, shipped_pipeline
from distill.overrides import find_override
from distill.plan_backbones import backbone_pipeline
from distill.resources import find
from distill.teacher import Teacher

#: Of a hub repository: the configurations and the tokenizers' files, a few megabytes at most.
CONFIG_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "config.json")
_WRAPPED = ("forward", "encode", "decode", "get_text_features", "get_image_features")


def hollow_teacher(
    name: str, dtype: torch.dtype = torch.float32, revision: str | None = None, call: Mapping[str, Any] | None = None, override: str | None = None,
) -> Teacher:
    """The ``Teacher`` of a pipeline's configuration, with every network on the meta device.

    Args:
        name: a pipeline folder (its weights are not read, and may be missing), a shipped asset, a hub id, or the folder of
            a backbone alone (a ``config.json`` that names a diffusers class).
        call, override: as in the recipe's section ``teacher``.

    Raises:
        UserError: if there is no configuration to be found, or the pipeline could not be called.
    """
    folder = config_folder(name, revision)
    with quiet():
        pipeline = hollow_pipeline(folder, dtype)
        name_of_class = type(pipeline).__name__
        try:
            teacher = Teacher(pipeline, call, find_override(override, name_of_class))
        except UserError:
            raise
        except Exception as error:  # what a pipeline does with values that are made up is anything
            try:
                teacher = Teacher(_around_backbone(folder, None, dtype))
            except UserError:
                reason = f"{name_of_class} could not be called without its weights ({_first_line(error)})"
                raise UserError(f"{folder} cannot be planned: {reason}") from error
    return on_meta(teacher)


def config_folder(name: str, revision: str | None = None) -> Path:
    """The folder that holds the configuration of a teacher; for a hub id its small files are fetched.

    Raises:
        UserError: if there is none.
    """
    path = find(name)
    if path.is_dir():
        return path
    if path.is_file() or not _looks_like_hub_id(name):
        raise UserError(f"{name} is not a folder: give a pipeline folder, a backbone's folder with its config.json, or a hub id such as owner/model")
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(CONFIG_FILES), ignore_patterns=["*.safetensors.index.json", "*.bin"]))
    except Exception as error:  # the errors of three libraries: one line for all
        offline = "it is neither a local folder nor reachable on the hub from here (offline?)"
        raise UserError(f"{name} cannot be planned: {offline}; fetch its *.json files into a folder and name that [{type(error).__name__}]") from None


def hollow_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """A pipeline object whose networks have shapes only."""
    if not (folder / "model_index.json").is_file():
        return _around_backbone(folder, None, dtype)
    index = read_model_index(folder)
    class_name = index.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    import diffusers

    cls = shipped_pipeline(class_name) if class_name in SHIPPED_PIPELINES else getattr(diffusers, str(class_name), None)
    if cls is None:
        raise UserError(f"{folder} needs its own code ({class_name}), which is not run here: name the folder of its backbone instead")
    parts, settings = {}, {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and (value[0] is None or isinstance(value[0], str)):
            part = _part(folder / name, value[0], value[1], dtype)
            if part is _MISSING:  # the shapes that it would have told are known for some backbones
                return _around_backbone(folder, index, dtype)
            parts[name] = part
        else:
            settings[name] = value
    try:
        pipeline: Any = cls(**parts, **settings)
    except Exception as error:
        raise UserError(f"{class_name} could not be built from {folder}: {_first_line(error)}") from error
    return _callable(pipeline)


def _around_backbone(folder: Path, index: Mapping[str, Any] | None, dtype: torch.dtype) -> Any:
    """The stand-in pipeline for a folder that holds the configuration of a backbone but not all of the rest."""
    import diffusers

    for part in (folder, folder / "unet", folder / "transformer", folder / "prior"):
        config = part / "config.json"
        cls = getattr(diffusers, str(_read_json(config).get("_class_name")), None) if config.is_file() else None
        if isinstance(cls, type):
            backbone = _network(cls, part, dtype)
            library, scheduler_class = (index or {}).get("scheduler") or (None, None)
            scheduler = None
            if library == "diffusers" and hasattr(diffusers, str(scheduler_class)):
                found = _part(folder / "scheduler", library, scheduler_class, dtype)
                scheduler = getattr(diffusers, str(scheduler_class))() if found is _MISSING else found
            return _callable(backbone_pipeline(backbone, scheduler))
    raise UserError(f"{folder} cannot be planned: it has neither a model_index.json nor a config.json that names a diffusers backbone")


# -- parts --------------------------------------------------------------------------------------------------------------

_MISSING = object()


def _part(folder: Path, library: str | None, class_name: str | None, dtype: torch.dtype) -> Any:
    """A component: a network on the meta device, a scheduler, a tokenizer; None for one that planning has no use for."""
    if library not in ("diffusers", "transformers") or class_name is None:
        return None
    import diffusers
    import transformers

    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name, None)
    if cls is None:
        raise UserError(f"{folder}: the installed {library} has no {class_name}: upgrade it")
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return _network(cls, folder, dtype) if (folder / "config.json").is_file() else _MISSING
    if "scheduler" in folder.name:
        if not (folder / "scheduler_config.json").is_file():
            return cls()
        return cls.from_config(_read_json(folder / "scheduler_config.json"))
    folder = folder.resolve()  # a relative path may look like a hub id
    if "token" in class_name.lower():
        if not folder.is_dir():
            return StandInTokenizer(folder)
        try:
            return cls.from_pretrained(str(folder), local_files_only=True)
        except Exception:  # its files are not there: the length of its output is all that is wanted
            return StandInTokenizer(folder)
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception:  # image processors and the like: not needed to call the backbone
        return None


def _network(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    config = _read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            if hasattr(cls, "config_class") and cls.config_class is not None:  # transformers
                network = cls(cls.config_class.from_dict(config))
            else:
                network = cls.from_config(config)
    except Exception as error:
        raise UserError(f"{folder / 'config.json'} does not make a {cls.__name__}: {_first_line(error)}") from error
    return network.to(device="meta", dtype=dtype).eval().requires_grad_(False)  # buffers that were made from numpy are on the CPU until here


class StandInTokenizer:
    """What a pipeline needs of a tokenizer whose files are missing: ids of the right length."""

    def __init__(self, folder: Path) -> None:
        config = folder / "tokenizer_config.json"
        length = _read_json(config).get("model_max_length", 77) if config.is_file() else 77
        self.model_max_length = length if length < 10_000 else 512
        self.pad_token_id = self.eos_token_id = self.bos_token_id = 0
        self.padding_side, self.added_tokens_encoder = "right", dict[str, int]()

    def __call__(self, text: Any, max_length: int | None = None, **_: Any) -> Any:
        count = 1 if isinstance(text, str) else len(text)
        ids = torch.ones(count, max_length or self.model_max_length, dtype=torch.long)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def batch_decode(self, ids: Tensor, **_: Any) -> list[str]:
        return [""] * len(ids)


# -- calling what has no weights ----------------------------------------------------------------------------------------


_inside: ContextVar[bool] = ContextVar("inside a network on the meta device", default=False)


def _callable(pipeline: Any) -> Any:
    # To the outside everything is on the CPU, or the pipeline would place its latents where nobody can compare values.
    device = property(lambda self: torch.device("meta" if _inside.get() else "cpu"))
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            for name in _WRAPPED:
                if callable(getattr(component, name, None)):
                    setattr(component, name, _shapes_only(getattr(component, name)))
            _reclass(component, device=device)
    _reclass(pipeline, device=device, _execution_device=device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _reclass(thing: Any, **properties: property) -> None:
    """Other properties for one object. The class keeps its full name: transformers goes by it."""
    cls = type(thing)
    thing.__class__ = type(cls.__name__, (cls,), {**properties, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _shapes_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on the meta device, with values made up from a hash of the arguments: equal for equal ones. The shapes of
    an output are computed once for each choice of shapes of the arguments."""
    known: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _inside.get():
            return function(*args, **kwargs)
        digest = hashlib.blake2b(digest_size=8)
        for tensor in _tensors((args, kwargs)):
            values = tensor.detach()
            digest.update((values.float() if values.dtype == torch.bfloat16 else values).numpy().tobytes())  # NumPy has no bfloat16
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)
        key = repr(_mapped((args, kwargs), _to_meta))  # of a tensor on the meta device: its shape and dtype
        if key not in known:
            token = _inside.set(True)
            try:
                with torch.no_grad():
                    known[key] = function(*_mapped(args, _to_meta), **_mapped(kwargs, _to_meta))
            finally:
                _inside.reset(token)
        return _mapped(known[key], lambda t: _made_up(t, generator))

    return call


def _made_up(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(tree, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _mapped(tree: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """f on every tensor of nested containers and output classes."""
    if isinstance(tree, Tensor):
        return f(tree)
    if is_dataclass(tree) and not isinstance(tree, type) and isinstance(tree, Mapping):  # the output classes of both libraries
        return type(tree)(**{x.name: _mapped(getattr(tree, x.name), f) for x in fields(tree)})
    if isinstance(tree, Mapping):
        return {k: _mapped(v, f) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(v, f) for v in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(v, f) for v in tree)
    return tree


def on_meta(teacher: Teacher) -> Teacher:
    """The teacher with its backbone callable as it is, and what it says of conditions moved to where the backbone is."""
    denoiser, encode = teacher.denoiser, teacher.condition
    for network in {id(n): n for n in (teacher.backbone, *(c.module for c in denoiser.companions))}.values():
        for name in _WRAPPED:
            network.__dict__.pop(name, None)
        network.__class__ = type(network).__bases__[0]
    denoiser.call = _call_on_meta(denoiser.call)
    denoiser.companions = [replace(c, call=_call_on_meta(c.call)) for c in denoiser.companions]

    @functools.wraps(encode)
    def condition(inputs: Any, negative: Any = None) -> Condition:
        with torch.device("cpu"):  # whatever the caller builds
            return encode(inputs, negative).to("meta")

    teacher.condition = condition  # type: ignore[method-assign]
    return teacher


def _call_on_meta(call: Call) -> Call:
    return replace(call, constants={path: _mapped(value, _to_meta) for path, value in call.constants.items()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file that can be read: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
