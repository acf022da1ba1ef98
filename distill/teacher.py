"""Any diffusers pipeline as a teacher, by recording the pipeline's own call of its backbone.

The pipeline runs for a few steps while ``recording.py`` notes what its networks receive and what its scheduler does;
``probing.py`` reads off how the backbone is called, ``findings.py`` how guidance is arranged. So no file per model family:
what is left to say of single pipelines is in ``overrides/``. ``Teacher.check`` replays what was recorded and refuses a
teacher that does not agree.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distill.batching import takes_several
from distill.call import flatten, same
from distill.denoiser import BackboneDenoiser, Condition, Denoiser, cat
from distill.errors import UserError
from distill.findings import PROBE_GUIDANCE, Guidance, probe
from distill.guidance import Guided
from distill.latents import Autoencoder, Decoding, find_autoencoder
from distill.overrides import Override, find_override
from distill.probing import NotUnderstood, copies_of, values_of
from distill.recording import Recording, Step, networks, sigma_at, take_step
from distill.running import PROBE_STEPS, Runner, after_steps, before_calls, exact
from distill.schedule import Kind
from distill.walk import Walk

__all__ = ["Guidance", "Teacher"]


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
        self.pipeline, name = pipeline, type(pipeline).__name__
        override = self.override = override or find_override(None, name)
        modules = [c for c in getattr(pipeline, "components", {}).values() if isinstance(c, nn.Module)]
        if not modules:
            raise UserError(f"{name} has no backbone: it cannot be a teacher")
        for module in modules:
            module.eval().requires_grad_(False)
        self._runner = Runner(pipeline, call or {}, override)
        self._remembered: dict[Any, Condition] | None = None
        try:
            with exact():
                found = self._found = probe(self._runner, override)
        except NotUnderstood as error:
            raise UserError(
                f"{name} cannot be a teacher yet: {error}. If you know it, say it in an override: Override({error.field}=…), see distill/overrides"
            ) from None
        except ValueError as error:
            raise UserError(f"{name} cannot be a teacher: {error}") from None
        self.backbone_name, self.backbone, self.sample_shape = found.network, found.backbone, found.sample_shape
        self.guidance = found.guidance
        companions = [companion for companion, _ in found.companions]
        self.denoiser = BackboneDenoiser(found.backbone, found.schedule, found.understood.kind, found.understood.call, companions=companions)
        if found.guidance is not None:
            self.denoiser.guidance_rule = found.guidance.rule
        if not found.batched:
            _, x, t, told = next(self._recorded())
            others = [told] if self.guidance is None else [told, self.condition([self.placeholder()]).unconditional()]
            if not all(takes_several(self.denoiser, x, t, Condition(told.values), Condition(other.values)) for other in others):
                self.denoiser.call = replace(self.denoiser.call, alone=True)

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def input_name(self) -> str | None:
        """What the user conditions on: "prompt", "class_labels" or None."""
        return self._runner.input_name

    def placeholder(self) -> Any:
        """Some valid input: a prompt, a class, or None for an unconditional teacher."""
        return self._runner.placeholder

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def batched(self) -> bool:
        """Whether the pipeline takes several inputs at once."""
        return self._found.batched

    @property
    def scheduler_kind(self) -> Kind:
        """The kind of prediction that the pipeline gives its scheduler; some convert what their network says."""
        return self.walk.kind

    @property
    def walk(self) -> Walk:
        """Between the scheduler's samples and the backbone's states: most pipelines make no difference."""
        return self._found.walk

    @property
    def guidance_free(self) -> bool:
        """Whether the pipeline has no classifier-free guidance."""
        return self.guidance is None

    @property
    def classes(self) -> int | None:
        """Number of real classes of a class-conditional teacher (the null class not counted)."""
        if self.input_name != "class_labels":
            return None
        config: Any = self.backbone.config
        names = ("num_class_embeds", "num_embeds_ada_norm", "num_classes")
        count = next((int(config[n]) for n in names if config.get(n) is not None), None)
        null = self.pipeline.config.get("null_class")
        return count if null is None or count is None else count - 1

    def guided(self, scale: float) -> Denoiser:
        """The teacher under guidance of the given scale, as the pipeline itself means it (1: none)."""
        if scale == 1 or (self.guidance is None and self.denoiser.call.embedded is None):
            return self.denoiser
        return Guided(self.denoiser, scale, self.guidance.rule if self.guidance else "plain")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything beside the inputs that the pipeline's call is given when it encodes them."""
        return self._runner.call | {"negative_prompt": self._runner.negative, "off": self._found.off}

    def encoders(self) -> list[tuple[str, nn.Module]]:
        """The pipeline's other networks by name: what turns prompts into conditions, and images into samples."""
        helpers = {companion.name for companion, _ in self._found.companions}
        return [(k, v) for k, v in networks(self.pipeline).items() if k != self.backbone_name and k not in helpers]

    def rest_encoders(self, but_decoder: bool = False) -> None:
        """Keep what encodes prompts and images on the CPU, and bring it to the device only while it works. A few conditions
        that are asked for again (those of the sample grids) are remembered.

        Args:
            but_decoder: the autoencoder stays: a loss on decoded samples works through it at each step.
        """
        decoder = self.autoencoder.module if but_decoder and self.autoencoder is not None else None
        self._runner.rest([module for _, module in self.encoders() if module is not decoder])
        self._remembered = {}

    # -- conditions -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condition(self, inputs: Sequence[Any] | Tensor, negative: Sequence[str] | None = None) -> Condition:
        """Encode prompts, class labels or, for an unconditional teacher, placeholders: one entry per sample.

        The pipeline's own ``__call__`` encodes them; it is stopped before its backbone runs. The null condition is
        the negative prompt (by default that of ``call``, or what the pipeline does without one) or the null class.
        """
        entries = inputs.tolist() if isinstance(inputs, Tensor) else list(inputs)
        if self._remembered is not None and len(entries) <= REMEMBERED:
            key = (tuple(entries), None if negative is None else tuple(negative))
            if key not in self._remembered:
                if len(self._remembered) >= REMEMBERED:
                    self._remembered.pop(next(iter(self._remembered)))
                self._remembered[key] = self._encoded(entries, negative)
            return self._remembered[key]
        return self._encoded(entries, negative)

    def _encoded(self, entries: list[Any], negative: Sequence[str] | None) -> Condition:
        if self.input_name is None:
            one = self._condition([None], None)
            return one[[0] * len(entries)] if one.values else one
        if self.batched:
            return self._condition(entries, negative)
        return cat([self._condition([e], None if negative is None else [negative[i]]) for i, e in enumerate(entries)])

    def _condition(self, entries: list[Any], negative: Sequence[str] | None) -> Condition:
        found, guidance, batch = self._found, self.guidance, len(entries)
        if guidance is None:
            return self._plain_condition(entries)
        told = found.off | {guidance.argument: PROBE_GUIDANCE}  # any at which the pipeline encodes the null condition, too
        recording = self._first_calls(entries, told, guidance.skipped + guidance.calls, negative if negative is not None else [self._runner.negative] * batch)
        return self._guided_condition(recording, guidance, batch)

    def _guided_condition(self, recording: Recording, guidance: Guidance, batch: int) -> Condition:
        parts = self._values(recording, guidance.copies, batch, guidance.skipped)
        return Condition(parts[guidance.conditional], parts[1 - guidance.conditional])

    def _plain_condition(self, entries: list[Any]) -> Condition:
        """As the pipeline encodes without guidance: no null condition."""
        found = self._found
        recording = self._first_calls(entries, found.off, negative=[self._runner.negative] * len(entries))
        return Condition(self._values(recording, found.understood.copies, len(entries))[found.understood.kept])

    def _first_calls(
        self, entries: Sequence[Any], guidance: Mapping[str, float], calls: int = 1, negative: Sequence[str | None] | None = None, steps: int = PROBE_STEPS,
    ) -> Recording:
        """Everything up to the backbone's first calls, which are answered without being computed."""
        return self._dry(entries, guidance, steps=steps, negative=negative, stop=before_calls(calls, self._found.network))

    def _dry(self, entries: Sequence[Any], guidance: Mapping[str, Any], **settings: Any) -> Recording:
        """A run in which the backbone answers without being computed, unless the pipeline looks inside it."""
        try:
            return self._runner.run(entries, guidance, answers=self._found.answers, **settings)
        except Decoding:
            raise
        except Exception:
            if not self.looks_inside:
                raise
            return self._runner.run(entries, guidance, **settings)

    @cached_property
    def looks_inside(self) -> bool:
        """Whether the pipeline reads more of its backbone than the answer (attention maps), so that it has to be computed."""
        try:
            self._runner.run([self.placeholder()], self._found.off, stop=after_steps(1, self._found.network), answers=self._found.answers)
        except Exception:  # whatever a pipeline says that misses something
            return True
        return False

    def _values(self, recording: Recording, copies: int, batch: int, skipped: int = 0) -> list[dict[str, Tensor | list[Any]]]:
        """The conditions in the backbone's first calls, and its companions', one for each copy of the batch."""
        found = self._found
        fed = {path for companion, _ in found.companions for path in companion.feeds}
        parts: list[dict[str, Tensor | list[Any]]] = []
        everyone = [("", found.network, found.understood), *((f"{c.name}:", c.name, u) for c, u in found.companions)]
        for prefix, network, understood in everyone:
            singles = [
                values_of(single, understood, batch) for call in recording.first_calls(network)[0 if prefix else skipped :]
                for single in copies_of(flatten(call.arguments, understood.whole), understood.call.layouts, copies)
            ]
            parts = parts or [{} for _ in singles]
            for i, part in enumerate(parts):
                single = singles[min(i, len(singles) - 1)]  # a companion may run once for both
                part |= {f"{prefix}{k}": v for k, v in single.items() if prefix + k not in fed}
        return parts

    # -- sampling ---------------------------------------------------------------------------------------------------

    def noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Unit-variance noise of the sample's shape, drawn as the pipelines draw theirs."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor((batch, *self.sample_shape), generator, self.device, self.denoiser.dtype)

    @property
    def steps_name(self) -> str:
        """The argument of the pipeline's call that sets the number of steps."""
        return self._runner.steps_name

    @property
    def scheduler_name(self) -> str:
        """The component that samples: of the schedulers of a cascade, its last stage's."""
        used, parts = self._found.recorded.steps_of(self._found.network)[0].scheduler, self.pipeline.components
        same = [name for name, part in parts.items() if part is used]
        alike = [name for name, part in parts.items() if type(part) is type(used) and part.config == used.config]  # the pipeline made a copy
        return [*same, *alike, "scheduler"][0]

    @cached_property
    def spare_timesteps(self) -> int:
        """How many of its scheduler's timesteps the pipeline leaves out at the end (Würstchen's: its scheduler lists one more)."""
        found = self._found
        made = self._dry([self.placeholder()], found.off, lenient=True).steps_of(found.network)
        visited, listed = [float(s.timestep.reshape(-1)[0]) for s in made], [float(t) for t in made[-1].scheduler.timesteps]
        return len(listed) - len(visited) if visited == listed[: len(visited)] else 0

    def scheduler(self, steps: int) -> Any:
        """The pipeline's scheduler, set to so many steps by the pipeline itself (its sigmas, its shift)."""
        recording = self._first_calls([self.placeholder()], self._found.off, steps=steps)
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
        scale = getattr(scheduler, "init_noise_sigma", 1.0) if self.walk.trivial else self.walk.noise_scale
        x = self._drive(scheduler, condition, noise * scale, guidance, generator)
        return x / self.denoiser.schedule.data_scale

    @torch.no_grad()
    def _drive(
        self, scheduler: Any, condition: Condition, x: Tensor, guidance: float, generator: torch.Generator | None, visited: Sequence[Step] | None = None,
    ) -> Tensor:
        """The scheduler's own loop from x over its timesteps, with our ``Denoiser`` in the pipeline's place.

        Args:
            visited: steps of a recording: go to their timesteps, with the settings that the pipeline gave the scheduler.
        """
        denoiser, rows, walk = self.guided(guidance), self._found.rows, self.walk
        for i, timestep in enumerate(scheduler.timesteps if visited is None else [s.timestep for s in visited]):
            t = walk.at(timestep.to(x.device), sigma_at(scheduler, timestep))
            if not walk.trivial and not walk.schedule.sigma(t).all():
                continue  # clean data: where such a pipeline ends
            sample = rows(x)
            scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
            value = walk.for_scheduler(denoiser.predict(walk.state(scaled.reshape(x.shape), t), t, condition))
            method, settings = ("step", {}) if visited is None else (visited[i].method, visited[i].settings)
            x = take_step(getattr(scheduler, method), rows(value), timestep, sample, generator, settings).reshape(x.shape)
        return x

    # -- images -----------------------------------------------------------------------------------------------------

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The pipeline's way from samples to its decoder, found by probing; None for pixel-space pipelines."""
        if not any(hasattr(c, "decode") and isinstance(c, nn.Module) for c in self.pipeline.components.values()):
            return None
        found = self._found

        def run(x0: Tensor) -> Any:
            def final(step: Step) -> Tensor | None:
                first = x0.flatten(1)[:, : step.sample.numel()]  # of two states, what is decoded
                return first.reshape(step.sample.shape) if step.calls_of(found.network) else None

            arrays = {"output_type": "np"} if "output_type" in self._runner.parameters else {}
            return self._dry([self.placeholder()], {**found.off, **arrays}, override=final).result

        return find_autoencoder(self.pipeline, self.sample_shape, run, self.device, self.denoiser.dtype)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Samples → images (batch, channels, height, width) in [0, 1]."""
        with self._runner.awake():
            return self.decode_with_gradient(x0).clamp(0, 1)

    def decode_with_gradient(self, x0: Tensor) -> Tensor:
        """The same, differentiable and therefore not clamped."""
        x0 = x0 * self.denoiser.schedule.data_scale
        return (self.autoencoder.decode(x0) if self.autoencoder is not None else x0).float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) in [-1, 1] → x0 of the sample's shape (a VAE's mean, as the pipeline scales
        and lays it out)."""
        with self._runner.awake():
            x0 = images if self.autoencoder is None else self.autoencoder.encode(images)
        return x0 / self.denoiser.schedule.data_scale

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the decoded images."""
        channels, height, width = self.decode(torch.zeros(1, *self.sample_shape, device=self.device)).shape[-3:]
        return channels, height, width

    # -- the gate ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @exact()
    def check(self, tolerance: float = 1e-5) -> float:
        """Replay the recorded calls through the ``Denoiser``; the largest absolute difference of the model outputs.

        Raises:
            UserError: if it exceeds ``tolerance`` × the outputs' largest value (but at least 1): the recorded calling
                convention would train a student towards something that is not this teacher.
        """
        single, as_recorded = self._found.single, self.walk.recorded
        replayed = ((as_recorded(self.denoiser.predict(x, t, told)), step) for step, x, t, told in self._recorded())
        worst = _largest(_difference(mine, single(step.model_output)) for mine, step in replayed)
        if not worst <= tolerance:
            raise UserError(
                f"the Denoiser rebuilt from {type(self.pipeline).__name__} differs from its backbone by {worst:.1e} "
                f"(allowed {tolerance:.0e}); this pipeline needs an override"
            )
        return worst

    def _recorded(self) -> Iterator[tuple[Step, Tensor, Tensor, Condition]]:
        """The recorded steps with what the ``Denoiser`` is to be given for them."""
        found = self._found
        off = next(iter(found.off.values()), 1.0)
        for step in found.recorded.steps_of(found.network):
            values = self._values(Recording([step]), found.understood.copies, 1)[found.understood.kept]
            t = self.denoiser.schedule.from_model_time(step.timestep.to(self.device))
            yield step, found.single(step.scaled), t, Condition(values, guidance=torch.full((1,), off, device=self.device))

    @torch.no_grad()
    @exact()
    def reproduce(self, steps: int = PROBE_STEPS, guidance: float = 1.0) -> float:
        """Largest absolute difference between the pipeline's own sample and ours from the same noise and condition, over the
        sample's largest value (but at least 1).

        Where a pipeline changes the sample between the scheduler's steps (inpainting pastes what is known), or draws a new
        null condition for each, each step starts from the pipeline's own.
        """
        found, single = self._found, self._found.single
        arguments = dict(found.off)
        if self.guidance is not None and guidance != 1:
            arguments[self.guidance.argument] = guidance
        theirs, later = torch.Generator().manual_seed(0), torch.Generator()

        def note(recording: Recording) -> bool:
            if not recording.steps_of(found.network) and recording.calls and len(recording.first_calls(found.network)) == 1:
                later.set_state(theirs.get_state())  # what the pipeline draws after its initial noise, the scheduler draws
            return False

        negative = [self._runner.negative]  # also without guidance: the earlier stages of a cascade may be guided
        recording = self._runner.run([self.placeholder()], arguments, steps=steps, stop=note, lenient=True, negative=negative, generator=theirs)
        visited = recording.steps_of(found.network)
        encode = self.condition if guidance != 1 else self._plain_condition
        condition, scheduler = encode([self.placeholder()]), self.scheduler(steps)
        if self.guidance is not None and guidance != 1:
            told = [self._guided_condition(Recording([s]), self.guidance, 1) for s in visited]
            if all(_samples(c) == 1 for c in told) and any(not same(told[0].null, c.null) for c in told[1:]):  # noise, say, in place of text
                steps_told = zip(visited, told, strict=True)
                return _largest(_difference(self._drive(scheduler, c, single(s.sample), guidance, later, [s]), single(s.result)) for s, c in steps_told)
        if all(torch.equal(b.sample, a.result) for a, b in zip(visited, visited[1:], strict=False)):
            return _difference(self._drive(scheduler, condition, single(visited[0].sample), guidance, later, visited), single(visited[-1].result))
        return _largest(_difference(self._drive(scheduler, condition, single(s.sample), guidance, later, [s]), single(s.result)) for s in visited)


REMEMBERED = 32  #: conditions of at most so many inputs, and so many of them


def _samples(condition: Condition) -> int:
    """The most samples that an argument has an entry for."""
    return max((len(v) for v in (condition.null or {}).values()), default=1)


def _largest(differences: Iterable[float]) -> float:
    """NaN if one of them is (``max`` would pass it over)."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max())


def _difference(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
