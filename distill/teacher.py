"""Any diffusers pipeline as a teacher, by recording the pipeline's own call of its backbone.

The pipeline runs for a few steps while hooks note what its backbone receives and what its scheduler does:

* the tensors that change between the calls are the state and the time; everything else is the condition, already
  encoded, masked and positioned by the pipeline itself;
* the time's unit is the recorded time over ``scheduler.timesteps``;
* a guided and an unguided call tell which half of the doubled batch is conditional: by equality, never assumed.

So no file per model family. ``Teacher.check`` replays what was recorded and refuses a teacher that does not agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import BackboneDenoiser, Call, Condition, Denoiser, Guided, flatten
from distill.errors import UserError
from distill.schedule import from_scheduler

_BACKBONES = ("unet", "transformer", "prior")
PROBE_STEPS = 5  #: of a recording: enough for every solver (PNDM's warm-up refuses fewer than four)


class _Stop(Exception):
    """Raised by a hook when it has seen enough of the pipeline."""


@dataclass
class Recording:
    """What happened while a pipeline ran: the backbone's flattened arguments and outputs, the scheduler's timesteps."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None


@contextmanager
def _recording(pipeline: Any, backbone: nn.Module, stop_after: int | None) -> Iterator[Recording]:
    """Note every call of the backbone and every scheduler step; stop before the ``stop_after``-th call is computed."""
    recording = Recording()
    signature = inspect.signature(backbone.forward)
    scheduler_step = pipeline.scheduler.step

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        recording.calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in flatten(bound).items()})
        if stop_after is not None and len(recording.calls) >= stop_after:
            raise _Stop

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recording.outputs.append((output[0] if isinstance(output, tuple) else output.sample).clone())

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        recording.timesteps.append(torch.as_tensor(timestep))
        result = scheduler_step(model_output, timestep, sample, *args, **kwargs)
        recording.final = (result[0] if isinstance(result, tuple) else result.prev_sample).clone()
        return result

    hooks = [
        backbone.register_forward_pre_hook(before, with_kwargs=True),
        backbone.register_forward_hook(after, with_kwargs=True),
    ]
    pipeline.scheduler.step = step
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()
        del pipeline.scheduler.step  # the instance attribute; the class's method is seen again


class Teacher:
    """A pipeline, the ``Denoiser`` of its backbone, and the way from prompts or labels to conditions and back to images.

    Args:
        pipeline: a loaded diffusers pipeline; its modules are put in eval mode and frozen.

    Raises:
        UserError: if the pipeline's backbone, schedule or call cannot be understood.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.backbone_name, self.backbone = find_backbone(pipeline)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self._parameters = inspect.signature(pipeline.__call__).parameters
        #: what the user conditions on: "prompt", "class_labels" or None
        self.input_name = next((name for name in ("prompt", "class_labels") if self._takes(name)), None)
        try:
            schedule, kind = from_scheduler(pipeline.scheduler)
        except ValueError as error:
            raise UserError(f"{type(pipeline).__name__} cannot be a teacher: {error}") from None
        self._recorded = self._record([self.placeholder()], guidance=1.0)
        call, self.sample_shape = self._understand(self._recorded)
        self.denoiser = BackboneDenoiser(self.backbone, schedule, kind, call)
        self.guidance_free = not self._takes("guidance_scale")
        self._conditional_half = self._find_conditional_half()

    # -- what was recorded ------------------------------------------------------------------------------------------

    def _takes(self, name: str) -> bool:
        if name == "class_labels" and getattr(self.backbone.config, "num_class_embeds", 1) is None:
            return False
        return name in self._parameters

    def placeholder(self) -> Any:
        """Some valid input: a prompt, a class, or None for an unconditional teacher."""
        return {"prompt": "a photograph", "class_labels": 0, None: None}[self.input_name]

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @torch.no_grad()
    def _record(
        self, inputs: Sequence[Any], guidance: float | None, stop_after: int | None = None,
        negative: Sequence[str] | None = None, **extra: Any,
    ) -> Recording:
        arguments: dict[str, Any] = {"num_inference_steps": PROBE_STEPS} | extra
        if self.input_name is None:
            arguments["batch_size"] = len(inputs)
        else:
            arguments[self.input_name] = list(inputs)
        if guidance is not None and self._takes("guidance_scale"):
            arguments["guidance_scale"] = guidance
        if negative is not None and self._takes("negative_prompt"):
            arguments["negative_prompt"] = list(negative)
        # The images are not wanted: leave the decoder out where the pipeline can.
        arguments["output_type"] = "latent" if getattr(self.pipeline, "vae", None) is not None else "pt"
        with _recording(self.pipeline, self.backbone, stop_after) as recording:
            try:
                self.pipeline(**arguments)
            except _Stop:
                pass
        if not recording.calls:
            raise UserError(f"{type(self.pipeline).__name__} never called its {self.backbone_name}: it cannot be a teacher")
        return recording

    def _understand(self, recording: Recording) -> tuple[Call, tuple[int, ...]]:
        """Which argument is the state and which the time, the time's unit, and what stays the same."""
        first, *others = recording.calls  # some solvers visit a timestep twice: two calls would not do
        changed = [
            name for name, value in first.items()
            if isinstance(value, Tensor) and any(not torch.equal(value.double(), torch.as_tensor(o[name]).double()) for o in others)
        ]
        tensors = sorted(changed, key=lambda name: first[name].numel())
        if len(tensors) != 2 or first[tensors[0]].numel() != 1:
            raise UserError(
                f"the call of {type(self.backbone).__name__} was not understood: between two steps {changed} changed, "
                "where one state and one time were expected"
            )
        time, state = tensors
        recorded, timestep = float(first[time].reshape(-1)[0]), float(recording.timesteps[0].reshape(-1)[0])
        scale = 1.0 if timestep == 0 else recorded / timestep
        constants = {k: v for k, v in first.items() if k not in (state, time) and not _is_condition(v, len(first[state]))}
        constants["return_dict"] = False
        takes = inspect.signature(self.backbone.forward).parameters
        width = getattr(self.backbone.config, "time_cond_proj_dim", None)
        guidance = "timestep_cond" if "timestep_cond" in takes and width else None
        if guidance:
            constants.pop(guidance, None)
        return Call(state, time, round(scale, 9), constants, guidance), tuple(first[state].shape[1:])

    def _split(self, call: Mapping[str, Any], batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The condition of one recorded call and, where the batch was doubled, the null condition."""
        state = call[self.denoiser.call.state]
        skip = {self.denoiser.call.state, self.denoiser.call.time, self.denoiser.call.guidance}
        values = {k: v for k, v in call.items() if k not in skip and _is_condition(v, len(state))}
        if len(state) == batch:
            return values, None
        if len(state) != 2 * batch:
            raise UserError(f"guidance of {type(self.pipeline).__name__} was not understood: {len(state)} states for {batch} samples")
        halves = {k: v.chunk(2) for k, v in values.items()}
        c = self._conditional_half
        return {k: h[c] for k, h in halves.items()}, {k: h[1 - c] for k, h in halves.items()}

    def _find_conditional_half(self) -> int:
        """0 or 1: the half of a guided call that equals the unguided one. Pipelines differ in the order."""
        self._conditional_half = 1
        if self.guidance_free or self.input_name is None:
            return 1
        probe = self.placeholder()
        plain = self._split(self._recorded.calls[0], 1)[0]
        guided, null = self._split(self._record([probe], 2.0, stop_after=1).calls[0], 1)
        if null is None:
            return 1
        if all(torch.equal(guided[k], v) for k, v in plain.items()):
            return 1
        if all(torch.equal(null[k], v) for k, v in plain.items()):
            return 0
        raise UserError(f"neither half of a guided call of {type(self.pipeline).__name__} equals the unguided one")

    # -- conditions -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condition(self, inputs: Sequence[Any] | Tensor, negative: Sequence[str] | None = None) -> Condition:
        """Encode prompts, class labels or, for an unconditional teacher, placeholders: one entry per sample.

        The pipeline's own ``__call__`` encodes them; it is stopped before its backbone runs. The null condition is
        the negative prompt (empty by default) or the null class.
        """
        entries = inputs.tolist() if isinstance(inputs, Tensor) else list(inputs)
        if self.input_name is None:
            return Condition()
        guidance = None if self.guidance_free else 2.0
        recording = self._record(entries, guidance, stop_after=1, negative=negative)
        values, null = self._split(recording.calls[0], len(entries))
        return Condition(values, null)

    @property
    def has_null(self) -> bool:
        """Whether guidance is possible."""
        return self.condition([self.placeholder()]).null is not None

    @property
    def classes(self) -> int | None:
        """Number of real classes of a class-conditional teacher (the null class not counted)."""
        count = getattr(self.backbone.config, "num_class_embeds", None)
        if self.input_name != "class_labels" or count is None:
            return None
        null = self.pipeline.config.get("null_class")
        return count if null is None else count - 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the decoded images."""
        channels, height, width = self.sample_shape
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            return channels, height, width
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return vae.config.out_channels, height * factor, width * factor

    def guided(self, scale: float) -> Denoiser:
        """The teacher under classifier-free guidance of the given scale (1: none)."""
        return self.denoiser if scale == 1 else Guided(self.denoiser, scale)

    # -- sampling and images ----------------------------------------------------------------------------------------

    def noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Unit-variance noise of the backbone's shape, drawn as the pipelines draw theirs."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor((batch, *self.sample_shape), generator, self.device, self.denoiser.dtype)

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
        scheduler = self.pipeline.scheduler
        denoiser = self.guided(guidance)
        scheduler.set_timesteps(steps, device=self.device)
        x = noise * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for timestep in scheduler.timesteps:
            t = self.denoiser.schedule.from_model_time(timestep)
            prediction = denoiser.predict(scheduler.scale_model_input(x, timestep), t, condition)
            x = scheduler.step(prediction.value, timestep, x, **extra).prev_sample
        return x

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Samples → images (batch, channels, height, width) in [0, 1]."""
        vae = getattr(self.pipeline, "vae", None)
        if vae is not None:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            x0 = vae.decode(x0.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
        return (x0.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) in [-1, 1] → x0 of the backbone's shape (a VAE's mean, scaled)."""
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            return images
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
        return (latents - shift) * vae.config.scaling_factor

    # -- the gate ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, tolerance: float = 1e-5) -> float:
        """Replay the recorded calls through the ``Denoiser``; the largest absolute difference of the outputs.

        Raises:
            UserError: if it exceeds ``tolerance`` × the outputs' largest value (but at least 1): the recorded calling
                convention would train a student towards something that is not this teacher.
        """
        worst = 0.0
        for call, output, timestep in zip(self._recorded.calls, self._recorded.outputs, self._recorded.timesteps, strict=False):
            values, _ = self._split(call, 1)
            t = self.denoiser.schedule.from_model_time(timestep.double())
            mine = self.denoiser.predict(call[self.denoiser.call.state], t, Condition(values)).value
            target = output[:, : mine.shape[1]]
            worst = max(worst, float((mine - target).abs().max()) / max(1.0, float(target.abs().max())))
        if not worst <= tolerance:
            raise UserError(
                f"the Denoiser rebuilt from {type(self.pipeline).__name__} differs from its backbone by {worst:.1e} "
                f"(allowed {tolerance:.0e}); this pipeline needs an override"
            )
        return worst


def _is_condition(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch


def find_backbone(pipeline: Any) -> tuple[str, nn.Module]:
    """(name, module) of the network that a pipeline calls at each step.

    Raises:
        UserError: if it has none.
    """
    for name in _BACKBONES:
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise UserError(f"{type(pipeline).__name__} has no backbone among {', '.join(_BACKBONES)}: it cannot be a teacher")
