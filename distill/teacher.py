"""Any diffusers pipeline as a teacher, by recording the pipeline's own call of its backbone.

The pipeline runs for a few steps while ``recording.py`` notes what its networks receive and what its scheduler does;
``probing.py`` reads off how the backbone is called; a guided recording tells how guidance is arranged. So no file per
model family: what is left to say of single pipelines is in ``overrides/``. ``Teacher.check`` replays what was recorded
and refuses a teacher that does not agree.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distill.call import Affine, Layout, flatten, same
from distill.denoiser import BackboneDenoiser, Companion, Condition, Denoiser, Prediction
from distill.errors import UserError
from distill.guidance import Guided, find_rule
from distill.latents import Autoencoder, find_autoencoder
from distill.overrides import Override, find_override
from distill.probing import NotUnderstood, Understanding, copies_of, feeding, per_copy_answer, understand, understand_answer, values_of
from distill.recording import NetworkCall, Recording, Step, Stop, networks, record
from distill.schedule import from_scheduler

PROBE_STEPS = 5  #: of a recording: enough for every solver (PNDM's warm-up refuses fewer than four)
SEEN_STEPS = 3  #: of them are computed: two timesteps differ, even where a solver visits one twice
PROBE_GUIDANCE = 3.0
GUIDANCE_NAMES = ("true_cfg_scale", "guidance_scale", "text_guidance_scale", "cfg_scale", "decoder_guidance_scale")
OTHER_GUIDANCE = {  #: what switches off guidance of other kinds, which is not distilled: by perturbed or self-attention, by frame
    "pag_scale": 0.0, "sag_scale": 0.0, "min_guidance_scale": 1.0, "max_guidance_scale": 1.0,
}
PLACEHOLDER = {"prompt": "a photograph", "class_labels": 0, None: None}
LONGER_PROMPT = "a photograph of two"


@dataclass(frozen=True)
class Guidance:
    """How a pipeline arranges classifier-free guidance."""

    argument: str  #: of its call
    off: float
    copies: int  #: in one call of the backbone
    calls: int  #: of the backbone per step
    conditional: int  #: which of the two answers is the conditional one
    rule: str  #: how it combines them (``guidance.RULES``)


class Teacher:
    """A pipeline, the ``Denoiser`` of its backbone, and the way from prompts or labels to conditions and back to images.

    Args:
        pipeline: a loaded diffusers pipeline; its modules are put in eval mode and frozen.
        call: further arguments of the pipeline's call, the same for every sample: ``height``, ``image``, ``prompt_embeds``, …
        override: what cannot be inferred; the toolkit's own for the class (``overrides/``) if not given.

    Raises:
        UserError: if the pipeline's backbone, schedule or call cannot be understood; it names the override to write.
    """

    def __init__(self, pipeline: Any, call: Mapping[str, Any] | None = None, override: Override | None = None) -> None:
        self.pipeline = pipeline
        self.override = override or find_override(None, type(pipeline).__name__)
        components = getattr(pipeline, "components", {})
        if not any(isinstance(c, nn.Module) for c in components.values()):
            raise UserError(f"{type(pipeline).__name__} has no backbone: it cannot be a teacher")
        for component in components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self._parameters = inspect.signature(pipeline.__call__).parameters
        self.call = dict(self.override.call) | dict(call or {})
        self.input_name = self._input_name()
        self._placeholder = self.call.pop(self.input_name, PLACEHOLDER[self.input_name]) if self.input_name else None
        self._negative = self.call.pop("negative_prompt", "") if self.input_name == "prompt" else ""
        if isinstance(self._placeholder, (list, tuple)):
            self._placeholder = self._placeholder[0]
        try:
            self._probe()
        except NotUnderstood as error:
            raise UserError(
                f"{type(pipeline).__name__} cannot be a teacher yet: {error}. If you know it, say it in an override: "
                f"Override({error.field}=…), see distill/overrides"
            ) from None
        except ValueError as error:
            raise UserError(f"{type(pipeline).__name__} cannot be a teacher: {error}") from None

    # -- probing ----------------------------------------------------------------------------------------------------

    def _input_name(self) -> str | None:
        """What the user conditions on: "prompt", "class_labels" or None."""
        if "prompt" in self._parameters and not any(k.startswith("prompt_embeds") for k in self.call):
            return "prompt"
        if "class_labels" in self._parameters and getattr(_config(self.pipeline), "num_class_embeds", 1) is not None:
            unet = getattr(self.pipeline, "unet", None)
            if unet is None or getattr(unet.config, "num_class_embeds", 1) is not None:
                return "class_labels"
        return None

    def placeholder(self) -> Any:
        """Some valid input: a prompt, a class, or None for an unconditional teacher."""
        return self._placeholder

    def _probe(self) -> None:
        """Find the backbone and how it is called, with guidance switched off: at 1 for most pipelines, at 0 for some."""
        offs = self._unguided()
        problem: NotUnderstood | None = None
        for off in [offs] if self.override.guidance_off is not None else [offs, {k: 0.0 for k in offs}]:
            self._off = off
            try:
                self._understand()
                problem = None
            except NotUnderstood as error:
                problem = problem or error
                continue
            except Exception:
                if problem is None:
                    raise
                break  # the pipeline does not take the other value
            if self._understood.copies == 1:
                break
        if problem is not None:
            raise problem
        self.guidance, embedded = self._find_guidance()
        call = self._understood.call
        if embedded is not None:
            call = replace(call, embedded=embedded, constants={k: v for k, v in call.constants.items() if k != embedded[0]})
            call = replace(call, layouts={k: v for k, v in call.layouts.items() if k != embedded[0]})
            self._understood = replace(self._understood, call=call)
        self.denoiser = BackboneDenoiser(self.backbone, self._schedule, self._understood.kind, call, companions=[c for c, _ in self._companions])

    def _find_network(self) -> str:
        """The component that denoises: the last one called before a step of the scheduler; in a cascade, the last stage's."""
        cascade = sum(hasattr(c, "set_timesteps") for c in self.pipeline.components.values()) > 1
        seen = self._run([self.placeholder()], self._off, lenient=True, stop=None if cascade else _after_steps(1))
        if not seen.steps or not seen.steps[-1].calls:
            raise NotUnderstood("its scheduler's step was never called", "scheduler")
        return seen.steps[-1].calls[-1].network

    def _understand(self) -> None:
        self.backbone_name = self.override.network or self._find_network()
        self.backbone = networks(self.pipeline)[self.backbone_name]
        one = self._run([self.placeholder()], self._off, stop=_after_steps(SEEN_STEPS, self.backbone_name))
        steps = one.steps_of(self.backbone_name)
        others = {c.network for s in one.steps for c in s.calls[-1:]} - {self.backbone_name}
        if len(steps) < 2 and others:
            raise NotUnderstood(f"it denoises with {self.backbone_name} and {', '.join(sorted(others))}", "network")
        self._template = [c for c in steps[0].calls if c.network == self.backbone_name][-1].output
        two = self._first_call([self.placeholder()] * 2, self._off)
        longer = LONGER_PROMPT if self.input_name == "prompt" else self.placeholder()
        other = self._first_call([longer], self._off) if self.input_name == "prompt" else None
        known = {k: v for k in ("state",) if (v := getattr(self.override, k)) is not None}
        self._understood = understand(self.backbone, self.backbone_name, one, two, other, known)
        self._companions = self._find_companions(one, two, other)
        self._schedule, self._scheduler_kind = from_scheduler(one.scheduler)
        self._understood = understand_answer(self._understood, self.backbone, self.backbone_name, one, self._schedule, self._scheduler_kind)
        self._batched = two is not None
        self._recorded = one
        self.sample_shape = self._understood.sample_shape

    def _find_companions(self, one: Recording, two: Recording | None, other: Recording | None) -> list[tuple[Companion, Understanding]]:
        """The networks whose answers explain what else changes in the backbone's call from step to step."""
        missing = list(self._understood.unexplained)
        found: list[tuple[Companion, Understanding]] = []
        calls = one.steps_of(self.backbone_name)[0].calls
        flat = flatten([c for c in calls if c.network == self.backbone_name][-1].arguments, self._understood.whole)
        for call in calls:
            if call.network != self.backbone_name and call.output is not None and missing:
                feeds = feeding(missing, flat, call)
                if feeds:
                    module = networks(self.pipeline)[call.network]
                    understood = understand(module, call.network, one, two, other, {})
                    if understood.unexplained:
                        raise NotUnderstood(f"argument {understood.unexplained[0]!r} of {type(module).__name__} changes from step to step", "frozen")
                    found.append((Companion(call.network, module, understood.call, feeds), understood))
                    missing = [m for m in missing if m not in feeds]
        if missing:
            raise NotUnderstood(
                f"argument {missing[0]!r} of {type(self.backbone).__name__} changes from step to step, and is neither the state, nor a time, nor another network's answer", "frozen",
            )
        return found

    def _unguided(self) -> dict[str, float]:
        """The arguments that switch guidance off."""
        if self.override.guidance is not None:
            return {self.override.guidance: 1.0 if self.override.guidance_off is None else self.override.guidance_off}
        return {name: off for name, off in (*((n, 1.0) for n in GUIDANCE_NAMES), *OTHER_GUIDANCE.items()) if name in self._parameters}

    def _run(
        self, inputs: Sequence[Any], guidance: Mapping[str, float], *, steps: int = PROBE_STEPS, negative: Sequence[str] | None = None,
        extra: Mapping[str, Any] | None = None, lenient: bool = False, **settings: Any,
    ) -> Recording:
        """Run the pipeline's own call and record it.

        Args:
            lenient: errors after the first step are not of interest: they are the decoder's.
        """
        arguments: dict[str, Any] = dict(self.call) | dict(guidance) | dict(extra or {})
        if "num_inference_steps" in self._parameters:
            arguments["num_inference_steps"] = steps
        if "generator" in self._parameters and "generator" not in arguments:
            arguments["generator"] = torch.Generator().manual_seed(0)
        if self.input_name is not None:
            arguments[self.input_name] = list(inputs) if len(inputs) > 1 or self.input_name != "prompt" else inputs[0]
        elif "batch_size" in self._parameters:
            arguments["batch_size"] = len(inputs)
        elif len(inputs) > 1:
            count = next((n for n in self._parameters if n.startswith("num_") and n.endswith("_per_prompt")), None)
            if count is None:
                raise _CannotBatch
            arguments[count] = len(inputs)
        if negative is not None and "negative_prompt" in self._parameters and self.input_name == "prompt":
            arguments["negative_prompt"] = list(negative) if len(inputs) > 1 else negative[0]
        with torch.no_grad(), torch.random.fork_rng(), record(self.pipeline, **settings) as recording:
            torch.manual_seed(0)  # some pipelines draw from the global generator, too
            try:
                recording.result = self.pipeline(**arguments)
            except Stop:
                pass
            except Exception:
                if not (lenient and recording.steps):
                    raise
        return recording

    def _first_call(self, inputs: Sequence[Any], guidance: Mapping[str, float], calls: int = 1, **settings: Any) -> Recording | None:
        """Everything up to the backbone's first calls; they are answered without being computed. None if the pipeline refuses."""
        def enough(recording: Recording) -> bool:
            return len(recording.first_calls(self.backbone_name)) >= calls or bool(recording.steps_of(self.backbone_name))

        try:
            return self._run(inputs, guidance, stop=enough, answers={self.backbone_name: self._answer}, **settings)
        except Exception as error:
            if len(inputs) > 1 or settings.get("tolerant"):
                return None
            raise error

    def _answer(self, arguments: Mapping[str, Any]) -> Any:
        """An answer of the right shape for any batch, without computing it."""
        state = _leading(flatten(arguments, self._whole), self._state_path)
        return pytree.tree_map(lambda v: v.repeat(math.ceil(state / len(v)), *(1,) * (v.dim() - 1))[:state] if isinstance(v, Tensor) and v.dim() else v, self._template)

    @property
    def _whole(self) -> tuple[str, ...]:
        return self._understood.whole if hasattr(self, "_understood") else ()

    @property
    def _state_path(self) -> str | None:
        return self._understood.call.state if hasattr(self, "_understood") else None

    def _find_guidance(self) -> tuple[Guidance | None, tuple[str, Affine] | None]:
        """How guidance is arranged; and the argument that takes the scale itself, where the backbone has one."""
        embedded = None
        for name, off in self._off.items():
            if name in OTHER_GUIDANCE:
                continue
            found = self._run([self.placeholder()], self._off | {name: PROBE_GUIDANCE}, stop=_after_steps(1, self.backbone_name), negative=[self._negative])
            if not found.steps_of(self.backbone_name):
                continue
            step = found.steps_of(self.backbone_name)[0]
            calls = [c for c in step.calls if c.network == self.backbone_name]
            answers = [a for c in calls for a in self._answers(c)]
            guided = self._single(step.model_output)  # some double the scheduler's sample, too
            if len(answers) == 1:
                embedded = embedded or self._find_embedded(name, off, calls[0])
            elif len(answers) == 2:
                tolerance = 1e-4 if guided.dtype == torch.float32 else 2e-2
                rule = find_rule(answers, guided, PROBE_GUIDANCE, tolerance, self.sample_shape[0] if step.sample.dim() > 1 else None)
                if rule is not None:
                    self._learn_from_guided(calls)
                    return Guidance(name, off, 2 // len(calls), len(calls), rule[1], rule[0]), embedded
        return None, embedded

    def _learn_from_guided(self, calls: Sequence[NetworkCall]) -> None:
        """What was the same for every sample, but is another for the null condition, belongs to the samples after all."""
        understood = self._understood
        told = [flatten(c.arguments, understood.whole) for c in calls]
        layouts = dict(understood.call.layouts)
        for path, value in understood.call.constants.items():
            guided = [t.get(path) for t in told]
            if isinstance(value, Tensor) and isinstance(guided[0], Tensor) and value.dim() and guided[0].shape == (2 * len(value), *value.shape[1:]):
                layouts[path] = Layout("stacked", 0, len(value))
            elif len(guided) == 2 and any(not same(value, g) for g in guided):
                layouts[path] = Layout("shared")
        constants = {k: v for k, v in understood.call.constants.items() if k not in layouts}
        self._understood = replace(understood, call=replace(understood.call, layouts=layouts, constants=constants))

    def _single(self, value: Tensor) -> Tensor:
        """What a scheduler was given or made, for one input, as (1, *sample_shape or more channels)."""
        rows = 1 if len(self.sample_shape) == value.dim() - 1 else self.sample_shape[0]
        return value[:1] if rows == 1 else value[:rows].unsqueeze(0)

    def _rows(self, x: Tensor) -> Tensor:
        """The inverse of ``_single`` for a batch: as the scheduler takes it."""
        return x if x.dim() == len(self._recorded.steps_of(self.backbone_name)[0].sample.shape) else x.flatten(0, 1)

    def _answers(self, call: NetworkCall) -> list[Tensor]:
        """The model outputs in one call's answer to one input, one per copy."""
        understood, batch = self._understood, 1
        rows = len(flatten(call.arguments, understood.whole)[understood.call.state])
        copies = max(1, rows // understood.call.layouts[understood.call.state].rows)
        leave, sign = understood.call.leave, understood.call.sign
        return [sign * (leave(p) if leave is not None else p) for p in per_copy_answer(call.output, batch, copies)]

    def _find_embedded(self, name: str, off: float, call: NetworkCall) -> tuple[str, Affine] | None:
        plain = flatten(self._recorded.first_calls(self.backbone_name)[-1].arguments, self._understood.whole)
        for path, value in flatten(call.arguments, self._understood.whole).items():
            before = plain.get(path)
            if path in (self._understood.call.state, self._understood.call.guidance) or path in self._understood.call.times:
                continue
            if isinstance(value, Tensor) and isinstance(before, Tensor) and value.numel() == 1 and before.numel() == 1 and float(value) != float(before):
                scale = (float(value) - float(before)) / (PROBE_GUIDANCE - off)
                return path, Affine(scale, float(before) - scale * off)
        return None

    # -- conditions -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @torch.no_grad()
    def condition(self, inputs: Sequence[Any] | Tensor, negative: Sequence[str] | None = None) -> Condition:
        """Encode prompts, class labels or, for an unconditional teacher, placeholders: one entry per sample.

        The pipeline's own ``__call__`` encodes them; it is stopped before its backbone runs. The null condition is
        the negative prompt (by default that of ``call``, or empty) or the null class.
        """
        from distill.denoiser import cat

        entries = inputs.tolist() if isinstance(inputs, Tensor) else list(inputs)
        if self.input_name is None:
            one = self._condition([None], None)
            return one[[0] * len(entries)] if one.values else one
        if self._batched:
            return self._condition(entries, negative)
        return cat([self._condition([e], None if negative is None else [negative[i]]) for i, e in enumerate(entries)])

    def _condition(self, entries: list[Any], negative: Sequence[str] | None) -> Condition:
        understood, guidance = self._understood, self.guidance
        batch = len(entries)
        if guidance is None:
            recording = self._first_call(entries, self._off)
            assert recording is not None
            return Condition(self._values(recording, understood.copies, batch)[understood.kept])
        told = self._off | {guidance.argument: PROBE_GUIDANCE}
        recording = self._first_call(entries, told, guidance.calls, negative=negative if negative is not None else [self._negative] * batch)
        if recording is None:
            raise UserError(f"{type(self.pipeline).__name__} refused these inputs")
        parts = self._values(recording, guidance.copies, batch)
        return Condition(parts[guidance.conditional], parts[1 - guidance.conditional])

    def _values(self, recording: Recording, copies: int, batch: int) -> list[dict[str, Tensor | list[Any]]]:
        """The conditions in the backbone's first calls, and its companions', one for each copy of the batch."""
        parts: list[dict[str, Tensor | list[Any]]] = []
        everyone = [("", self.backbone_name, self._understood), *((f"{c.name}:", c.name, u) for c, u in self._companions)]
        for prefix, network, understood in everyone:
            singles = [
                values_of(single, understood, batch) for call in recording.first_calls(network)
                for single in copies_of(flatten(call.arguments, understood.whole), understood.call.layouts, copies)
            ]
            parts = parts or [{} for _ in singles]
            for i, part in enumerate(parts):
                single = singles[min(i, len(singles) - 1)]  # a companion may run once for both
                part |= {f"{prefix}{k}": v for k, v in single.items() if prefix + k not in self._fed}
        return parts

    @property
    def _fed(self) -> set[str]:
        return {path for c, _ in self._companions for path in c.feeds}

    @property
    def guidance_free(self) -> bool:
        """Whether the pipeline has no classifier-free guidance."""
        return self.guidance is None

    @property
    def has_null(self) -> bool:
        """Whether guidance is possible."""
        return self.guidance is not None

    @property
    def classes(self) -> int | None:
        """Number of real classes of a class-conditional teacher (the null class not counted)."""
        if self.input_name != "class_labels":
            return None
        count = next((int(c) for n in ("num_class_embeds", "num_embeds_ada_norm", "num_classes") if (c := self.backbone.config.get(n)) is not None), None)
        null = self.pipeline.config.get("null_class")
        return count if null is None or count is None else count - 1

    def guided(self, scale: float) -> Denoiser:
        """The teacher under guidance of the given scale, as the pipeline itself means it (1: none)."""
        if scale == 1 or (self.guidance is None and self.denoiser.call.embedded is None):
            return self.denoiser
        rule = self.guidance.rule if self.guidance else "plain"
        return Guided(self.denoiser, scale, rule)

    # -- sampling and images ----------------------------------------------------------------------------------------

    def noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Unit-variance noise of the backbone's shape, drawn as the pipelines draw theirs."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor((batch, *self.sample_shape), generator, self.device, self.denoiser.dtype)

    def scheduler(self, steps: int) -> Any:
        """The pipeline's scheduler, set to so many steps by the pipeline itself (its sigmas, its shift)."""
        recording = self._first_call([self.placeholder()], self._off, steps=steps)
        assert recording is not None
        return copy.deepcopy(recording.scheduler)  # the next recording sets the pipeline's own to other steps

    @torch.no_grad()
    def sample(
        self, condition: Condition, noise: Tensor, steps: int, guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x0 by driving the pipeline's own scheduler with our ``Denoiser``: (batch, ...) → (batch, ...).

        Args:
            noise: unit-variance noise; the scheduler's ``init_noise_sigma`` is applied here.
            generator: for schedulers that draw noise at each step.
        """
        scheduler = self.scheduler(steps)
        return self.drive(scheduler, condition, noise * getattr(scheduler, "init_noise_sigma", 1.0), guidance, generator)

    @torch.no_grad()
    def drive(
        self, scheduler: Any, condition: Condition, x: Tensor, guidance: float = 1.0, generator: torch.Generator | None = None, steps: Sequence[Step] | None = None,
    ) -> Tensor:
        """The scheduler's own loop from x over its timesteps, with our ``Denoiser`` in the pipeline's place.

        Args:
            steps: of a recording: visit its timesteps, with the settings that the pipeline gave the scheduler.
        """
        denoiser = self.guided(guidance)
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for i, timestep in enumerate(scheduler.timesteps if steps is None else [s.timestep for s in steps]):
            t = self.denoiser.schedule.from_model_time(timestep.to(x.device))
            rows = self._rows(x)
            scaled = scheduler.scale_model_input(rows, timestep) if hasattr(scheduler, "scale_model_input") else rows
            value = self._for_scheduler(denoiser.predict(scaled.reshape(x.shape), t, condition))
            settings = {} if steps is None else steps[i].settings
            x = scheduler.step(self._rows(value), timestep, rows, **extra, **settings, return_dict=False)[0].reshape(x.shape)
        return x

    def _for_scheduler(self, prediction: Prediction) -> Tensor:
        """What the pipeline would give its scheduler."""
        value = prediction.value if prediction.kind == self._scheduler_kind else prediction.as_kind(self._scheduler_kind).to(prediction.value.dtype)
        return value if prediction.extra is None else torch.cat([value, prediction.extra], 1)

    @torch.no_grad()
    def reproduce(self, steps: int = PROBE_STEPS, guidance: float = 1.0) -> float:
        """Largest absolute difference between the pipeline's own sample and ours from the same noise and condition, over the
        sample's largest value (but at least 1).

        Where a pipeline changes the sample between the scheduler's steps (inpainting pastes what is known), each step starts
        from the pipeline's own.
        """
        arguments = dict(self._off)
        if self.guidance is not None:
            arguments[self.guidance.argument] = guidance if guidance != 1.0 else self.guidance.off
        own = torch.Generator().manual_seed(0)
        seen: dict[str, Tensor] = {}

        def stop(recording: Recording) -> bool:
            if recording.calls and "state" not in seen and recording.calls[-1].network == self.backbone_name:
                seen["state"] = own.get_state()  # what the pipeline draws after its initial noise, the scheduler draws
            return False

        theirs = self._run([self.placeholder()], arguments, steps=steps, stop=stop, lenient=True, negative=[self._negative] if guidance != 1.0 else None, extra={"generator": own} if "generator" in self._parameters else None)
        generator = torch.Generator()
        if "state" in seen:
            generator.set_state(seen["state"])
        scheduler = self.scheduler(steps)  # what it draws from the global generator, it draws again
        visited, condition = theirs.steps_of(self.backbone_name), self.condition([self.placeholder()])
        single = self._single
        if all(torch.equal(b.sample, a.result) for a, b in zip(visited, visited[1:], strict=False)):
            pairs = [(self.drive(scheduler, condition, single(visited[0].sample), guidance, generator, visited), single(visited[-1].result))]
        else:
            pairs = [(self.drive(scheduler, condition, single(s.sample), guidance, generator, [s]), single(s.result)) for s in visited]
        return max(float((mine - theirs).abs().max()) / max(1.0, float(theirs.abs().max())) for mine, theirs in pairs)

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The pipeline's way from samples to its decoder, found by probing; None for pixel-space pipelines."""
        if not any(hasattr(c, "decode") and isinstance(c, nn.Module) for c in self.pipeline.components.values()):
            return None

        def run(x0: Tensor) -> None:
            self._run([self.placeholder()], self._off, answers={self.backbone_name: self._answer}, override=lambda step: x0)

        return find_autoencoder(self.pipeline, self.sample_shape, run, self.device, self.denoiser.dtype)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Samples → images (batch, channels, height, width) in [0, 1]."""
        decoded = self.autoencoder.decode(x0) if self.autoencoder is not None else x0
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) in [-1, 1] → x0 of the backbone's shape (a VAE's mean, scaled)."""
        return images if self.autoencoder is None else self.autoencoder.encode(images)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the decoded images."""
        return tuple(self.decode(torch.zeros(1, *self.sample_shape, device=self.device)).shape[1:])

    # -- the gate ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, tolerance: float = 1e-5) -> float:
        """Replay the recorded calls through the ``Denoiser``; the largest absolute difference of the outputs.

        Raises:
            UserError: if it exceeds ``tolerance`` × the outputs' largest value (but at least 1): the recorded calling
                convention would train a student towards something that is not this teacher.
        """
        worst = 0.0
        off = next(iter(self._off.values()), 1.0)
        for step in self._recorded.steps_of(self.backbone_name):
            values = self._values(Recording([step]), self._understood.copies, 1)[self._understood.kept]
            t = self.denoiser.schedule.from_model_time(step.timestep.to(self.device))
            told = Condition(values, guidance=torch.full((1,), off, device=self.device))
            mine, theirs = self._for_scheduler(self.denoiser.predict(self._single(step.scaled), t, told)), self._single(step.model_output)
            worst = max(worst, float((mine - theirs).abs().max()) / max(1.0, float(theirs.abs().max())))
        if not worst <= tolerance:
            raise UserError(
                f"the Denoiser rebuilt from {type(self.pipeline).__name__} differs from its backbone by {worst:.1e} "
                f"(allowed {tolerance:.0e}); this pipeline needs an override"
            )
        return worst


class _CannotBatch(Exception):
    """This pipeline makes one sample per call."""


def _after_steps(count: int, network: str | None = None) -> Any:
    return lambda recording: len(recording.steps_of(network)) >= count


def _config(pipeline: Any) -> Any:
    return getattr(pipeline, "config", None)


def _leading(flat: Mapping[str, Any], path: str | None) -> int:
    """The number of rows of a call."""
    if path is not None:
        return len(flat[path])
    return max((len(v) for v in flat.values() if isinstance(v, Tensor) and v.dim() > 1), default=1)
