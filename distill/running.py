"""Running a pipeline's own ``__call__`` for the sake of what it does, with as little computed as possible."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distill.call import flatten
from distill.loading import conditioned_on
from distill.overrides import Override
from distill.recording import Recording, Stop, networks, record

PROBE_STEPS = 5  #: of a recording: enough for every solver (PNDM's warm-up refuses fewer than four)
PLACEHOLDER = {"prompt": "a photograph", "class_labels": 0, None: None}
GUIDANCE_NAMES = ("true_cfg_scale", "guidance_scale", "text_guidance_scale", "cfg_scale", "decoder_guidance_scale")
OTHER_GUIDANCE = {  #: what switches off guidance of other kinds, which is not distilled: by perturbed or self-attention, by frame
    "pag_scale": 0.0, "sag_scale": 0.0, "min_guidance_scale": 1.0, "max_guidance_scale": 1.0,
}


class CannotBatch(Exception):
    """This pipeline makes one sample per call."""


class Runner:
    """A pipeline with what its call is given each time.

    Args:
        call: further arguments of the pipeline's call. Its ``prompt`` or ``class_labels`` is the input that probing uses, its
            ``negative_prompt`` the default one.
    """

    def __init__(self, pipeline: Any, call: Mapping[str, Any], override: Override) -> None:
        self.pipeline = pipeline
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self.call = dict(override.call) | dict(call)
        #: what the user conditions on: "prompt", "class_labels" or None
        self.input_name = self._input_name()
        placeholder = self.call.pop(self.input_name, PLACEHOLDER[self.input_name]) if self.input_name else None
        #: some valid input
        self.placeholder = placeholder[0] if isinstance(placeholder, (list, tuple)) else placeholder
        #: the negative prompt; None where the pipeline is told none (not always the same: SDXL's own default are zeros)
        self.negative = self.call.pop("negative_prompt", None) if self.input_name == "prompt" else None
        self.offs = self._offs(override)
        #: the argument that sets the number of steps
        self.steps_name = override.steps or "num_inference_steps"
        self._resting: list[nn.Module] = []

    def rest(self, modules: Sequence[nn.Module]) -> None:
        """Keep these networks on the CPU but for the time of a run."""
        self._resting = [m for m in modules if _device(m).type not in ("cpu", "meta")]
        for module in self._resting:
            module.to("cpu")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """All of the pipeline's networks on the device that the others are on, for the time of the block."""
        resting, self._resting = self._resting, []
        if not resting:
            yield
            return
        device = next(_device(m) for m in networks(self.pipeline).values() if all(m is not r for r in resting))
        try:
            for module in resting:
                module.to(device)
            yield
        finally:
            for module in resting:
                module.to("cpu")
            self._resting = resting

    def _input_name(self) -> str | None:
        kind = conditioned_on(self.pipeline)
        embedded = kind == "prompt" and any(k.startswith("prompt_embeds") for k in self.call)  # the user has encoded it
        return None if embedded else kind

    def _offs(self, override: Override) -> list[dict[str, float]]:
        """The settings that may switch guidance off, the likelier first: 1 for most pipelines, 0 for some."""
        if override.guidance is not None:
            return [{override.guidance: 1.0 if override.guidance_off is None else override.guidance_off}]
        names = [n for n in GUIDANCE_NAMES if n in self.parameters] + guiders(self.pipeline)
        others = {n: off for n, off in OTHER_GUIDANCE.items() if n in self.parameters}
        return [dict.fromkeys(names, 1.0) | others] + ([dict.fromkeys(names, 0.0) | others] if names else [])

    def run(
        self, inputs: Sequence[Any], guidance: Mapping[str, Any], *, steps: int = PROBE_STEPS, negative: Sequence[str | None] | None = None,
        generator: torch.Generator | None = None, lenient: bool = False, **settings: Any,
    ) -> Recording:
        """Run the pipeline and record it; equal calls draw equal noise.

        Args:
            lenient: errors after the first step are not of interest: they are the decoder's.
            settings: of ``recording.record``.
        """
        arguments: dict[str, Any] = dict(self.call) | {k: v for k, v in guidance.items() if "." not in k}
        if self.steps_name in self.parameters:
            arguments[self.steps_name] = steps
        if "generator" in self.parameters and "generator" not in arguments:
            arguments["generator"] = generator or torch.Generator().manual_seed(0)
        if self.input_name is not None:
            arguments[self.input_name] = list(inputs) if len(inputs) > 1 or self.input_name != "prompt" else inputs[0]
        elif "batch_size" in self.parameters:
            arguments["batch_size"] = len(inputs)
        elif len(inputs) > 1:
            count = next((n for n in self.parameters if n.startswith("num_") and n.endswith("_per_prompt")), None)
            if count is None:
                raise CannotBatch
            arguments[count] = len(inputs)
        if negative is not None and None not in negative and "negative_prompt" in self.parameters and self.input_name == "prompt":
            arguments["negative_prompt"] = list(negative) if len(inputs) > 1 else negative[0]
        with torch.no_grad(), self.awake(), torch.random.fork_rng(), _set(self.pipeline, guidance), record(self.pipeline, **settings) as recording:
            torch.manual_seed(0)  # some pipelines draw from the global generator, too
            try:
                recording.result = self.pipeline(**arguments)
            except Stop:
                pass
            except Exception:
                if not (lenient and recording.steps):
                    raise
        return recording


@contextmanager
def exact() -> Iterator[None]:
    """Float32 convolutions in float32. cuDNN rounds their inputs to 10 bits (TF32), and answers of one sample and of the same
    sample in a batch, which probing compares, would differ by as much."""
    now = torch.backends.cudnn
    with now.flags(enabled=now.enabled, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False):
        yield


def guiders(pipeline: Any) -> list[str]:
    """Guidance that belongs to a component in place of the call: ``guider.guidance_scale``."""
    return [f"{name}.guidance_scale" for name, c in pipeline.components.items() if hasattr(c, "guidance_scale") and hasattr(c, "num_conditions")]


@contextmanager
def _set(pipeline: Any, guidance: Mapping[str, float]) -> Iterator[None]:
    """The settings among these that belong to components, for the time of the block."""
    before = []
    for path, value in guidance.items():
        name, dot, attribute = path.partition(".")
        if dot:
            before.append((pipeline.components[name], attribute, getattr(pipeline.components[name], attribute)))
            setattr(pipeline.components[name], attribute, value)
    try:
        yield
    finally:
        for component, attribute, value in before:
            setattr(component, attribute, value)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def after_steps(count: int, network: str | None = None) -> Callable[[Recording], bool]:
    """Stop after so many steps that the network has a part in."""
    return lambda recording: len(recording.steps_of(network)) >= count


def before_calls(count: int, network: str) -> Callable[[Recording], bool]:
    """Stop at so many calls of the network, or after a step of it."""
    return lambda recording: len(recording.first_calls(network)) >= count or bool(recording.steps_of(network))


def repeated(template: Any, whole: Sequence[str], state: str | None) -> Callable[[dict[str, Any]], Any]:
    """A network's answer of the right shape for any batch, without computing it.

    Args:
        template: its answer to one input.
        whole, state: see ``probing.Understanding``; the largest argument counts where they are not known yet.
    """

    def answer(arguments: dict[str, Any]) -> Any:
        flat = flatten(arguments, whole)
        rows = len(flat[state]) if state is not None else max((len(v) for v in flat.values() if isinstance(v, Tensor) and v.dim() > 1), default=1)

        def fit(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value
            return value.repeat(math.ceil(rows / len(value)), *(1,) * (value.dim() - 1))[:rows]

        return pytree.tree_map(fit, template)

    return answer


def is_cascade(pipeline: Any) -> bool:
    """Whether a pipeline samples in several stages, each with its own scheduler."""
    return sum(hasattr(c, "set_timesteps") for c in pipeline.components.values() if not isinstance(c, nn.Module)) > 1
