"""Load a diffusers pipeline safely: safetensors only, no remote code unless asked, one clear line when it fails."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import pprint
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from distill.errors import UserError
from distill.resources import find, resource

#: Pipelines that the toolkit ships: an exported folder that names one is loaded with our own copy of the file, so
#: that no code from the folder runs.
SHIPPED_PIPELINES = {"UNet2DPipeline": "unet2d"}
SHIPPED_MODELS = {"EndTime": "end_time"}  #: networks that an exported pipeline may have beside those of libraries
FACTS = "distill.json"  #: what an export says of itself
FEW_STEP_FILE = "pipeline.py"  #: of an export, loaded with ``custom_pipeline="pipeline"``


def shipped_pipeline(class_name: str) -> type:
    """The class of a pipeline file in ``pipelines/``."""
    return getattr(_module(SHIPPED_PIPELINES[class_name]), class_name)


def shipped_model(class_name: str) -> type:
    """The class of a network in ``pipelines/``."""
    return getattr(_module(SHIPPED_MODELS[class_name]), class_name)


def _module(stem: str) -> ModuleType:
    name = f"distill_pipelines_{stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, resource(f"pipelines/{stem}.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def few_step_source(facts: Mapping[str, Any]) -> str:
    """``pipelines/few_step.py`` for one student.

    Args:
        facts: as in distill.json: the stock "class", the "module" that defines it (diffusers, or .file beside it), "settings";
            where the pipeline asks for its kind, the "scheduler" of diffusers that the student's is one of.

    Raises:
        UserError: if the class or the module is no plain name.
    """
    name, module, scheduler = str(facts["class"]), str(facts["module"]), str(facts.get("scheduler", "SchedulerMixin"))
    if not name.isidentifier() or not scheduler.isidentifier() or not (module == "diffusers" or module.removeprefix(".").isidentifier()):
        raise UserError(f"{FACTS} names no pipeline class: export the student again")
    settings = pprint.pformat(dict(facts["settings"]), width=120, sort_dicts=False, compact=True)
    template = resource("pipelines/few_step.py").read_text(encoding="utf-8")
    stock, empty = "from diffusers import StableDiffusionPipeline as Stock\n", "SETTINGS = {}\n"
    mixin = "from diffusers import SchedulerMixin as StockScheduler\n"
    assert template.count(stock) == template.count(empty) == template.count(mixin) == 1
    template = template.replace(mixin, f"from diffusers import {scheduler} as StockScheduler\n")
    return template.replace(stock, f"from {module} import {name} as Stock\n").replace(empty, f"SETTINGS = {settings}\n")


def _is_our_few_step(folder: Path) -> bool:
    """Whether the pipeline file of a few-step export is, to the letter, the one that this toolkit writes: then running it
    is running our own code. Files of other classes in the folder must be the toolkit's own too."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))["few_step"]
        ours = few_step_source(facts) == (folder / FEW_STEP_FILE).read_text(encoding="utf-8")
        module = facts["module"].removeprefix(".")
        if ours and module != "diffusers":
            ours = module in SHIPPED_PIPELINES.values() and (folder / f"{module}.py").read_bytes() == resource(f"pipelines/{module}.py").read_bytes()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return False
    others = [p for p in folder.rglob("*.py") if p.name not in (FEW_STEP_FILE, f"{module}.py")]
    return ours and all(p.stem in SHIPPED_MODELS.values() and p.read_bytes() == resource(f"pipelines/{p.stem}.py").read_bytes() for p in others)


def read_model_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder.

    Raises:
        UserError: if the folder is no diffusers pipeline.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    try:
        index = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(index, dict):
        raise UserError(f"{path} should hold a JSON object")
    return index


def load_pipeline(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    few_step: bool = False,
) -> Any:
    """A diffusers pipeline from a folder, a shipped asset (``assets/digits-teacher``) or a hub id, in eval mode.

    Args:
        few_step: of an export, the few-step pipeline in place of the stock one.

    Raises:
        UserError: if it is missing, corrupt, holds pickles only, or wants code to be run that the user did not allow.
    """
    import diffusers

    path = find(name)
    arguments: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "revision": revision, "variant": variant}
    shipped: str | None = None
    if path.is_file():
        raise UserError(f"{name} is a file; a pipeline is a folder with a model_index.json, or a hub id")
    if path.is_dir():
        index = read_model_index(path)
        class_name = index.get("_class_name")
        arguments |= {part: None for part, value in index.items() if value == [None, None]}  # diffusers wants some of these said
        if isinstance(class_name, list):
            class_name = class_name[-1]
        if class_name in SHIPPED_PIPELINES and not few_step:
            shipped = str(class_name)
        elif (few_step or class_name == "FewStepPipeline") and (trust_remote_code or _is_our_few_step(path)):
            arguments |= {"custom_pipeline": Path(FEW_STEP_FILE).stem, "trust_remote_code": True}
        elif few_step:
            raise UserError(f"{name} holds no {FEW_STEP_FILE} of this version of distill: export the student again")
        elif not trust_remote_code and not hasattr(diffusers, str(class_name)):
            raise UserError(f"{name} needs its own code ({class_name}); read it, then set teacher.trust_remote_code: true")
        source = str(path)
    elif _looks_like_hub_id(str(name)):
        source = str(name)
    else:
        raise UserError(f"{name} does not exist: give a pipeline folder or a hub id such as owner/model")
    if trust_remote_code:
        arguments["trust_remote_code"] = True
    try:
        with quiet():
            if shipped:
                pipeline = _load_shipped(shipped, path, dtype)
            else:
                pipeline = diffusers.DiffusionPipeline.from_pretrained(source, **arguments)
    except Exception as error:  # every loader error of a dozen libraries: one line for all
        raise UserError(f"{name} could not be loaded: {_reason(error, path)}") from error
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline.to(device)


def _load_shipped(class_name: str, folder: Path, dtype: torch.dtype) -> Any:
    """A pipeline of ours from its folder, part by part: ``from_pretrained`` would run the copy that lies there."""
    import diffusers

    settings: dict[str, Any] = {}
    for name, value in read_model_index(folder).items():
        if name.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and value[0] == "diffusers":
            part = getattr(diffusers, value[1])
            weights = {"torch_dtype": dtype, "use_safetensors": True} if issubclass(part, torch.nn.Module) else {}
            settings[name] = part.from_pretrained(folder / name, **weights)
        else:
            settings[name] = value
    return shipped_pipeline(class_name)(**settings)


def conditioned_on(pipeline: Any) -> str | None:
    """What a pipeline's call takes one of per image: "prompt", "class_labels", or None."""
    parameters = inspect.signature(pipeline.__call__).parameters
    if "prompt" in parameters:
        return "prompt"
    backbone = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    conditional = getattr(getattr(backbone, "config", None), "num_class_embeds", 1) is not None
    return "class_labels" if "class_labels" in parameters and conditional else None


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~", "/")) and not name.endswith((".yaml", ".json"))


def _reason(error: Exception, path: Path) -> str:
    text = str(error)
    kind = type(error).__name__
    if path.is_dir() and not any(path.rglob("*.safetensors")) and any(path.rglob("*.bin")):
        return "it holds pickled weights (*.bin) only, which are never read; convert them to safetensors first"
    damaged = "safetensors" in text.lower() and ("header" in text.lower() or "unable to load weights" in text.lower())
    if kind == "SafetensorError" or damaged:
        return f"a weight file is corrupt or truncated ({text.splitlines()[0]}); fetch it again"
    offline = ("connect", "offline", "resolve", "couldn't find", "not a local folder", "max retries", "network")
    if not path.exists() and any(word in text.lower() for word in offline):
        return "it is neither a local folder nor reachable on the hub from here (offline?)"
    return (text.splitlines() or [kind])[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or notices of the loaders; errors still raise."""
    import diffusers.utils.logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        diffusers_logging.set_verbosity(level)
        diffusers_logging.enable_progress_bar()
