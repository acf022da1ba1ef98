"""How well-known backbones are called, from their configuration alone: for folders that have no text encoders to ask.

One function per class gives the shapes of its inputs for a batch. ``backbone_pipeline`` makes a pipeline of them that
``Teacher`` records like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError

Inputs = dict[str, Any]
CLIP_TOKENS, T5_TOKENS = 77, 256


def _images(config: Any, batch: int) -> Tensor:
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, config.in_channels, height, width)


def _unet2d(config: Any, batch: int) -> Inputs:
    labels = {} if config.num_class_embeds is None else {"class_labels": torch.randint(config.num_class_embeds, (batch,))}
    return {"sample": _images(config, batch), **labels}


def _unet2d_condition(config: Any, batch: int) -> Inputs:
    width = config.cross_attention_dim
    tokens = torch.randn(batch, CLIP_TOKENS, width if isinstance(width, int) else width[-1])
    inputs: Inputs = {"sample": _images(config, batch), "encoder_hidden_states": tokens}
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise UserError("a UNet2DConditionModel with class embeddings cannot be planned from its config.json alone: name the pipeline's folder")
    if config.addition_embed_type == "text_time":
        times = 6
        pooled = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.full((batch, times), 1024.0)}
    elif config.addition_embed_type is not None:
        raise UserError(f"a UNet2DConditionModel with addition_embed_type {config.addition_embed_type} cannot be planned alone: name the pipeline's folder")
    return inputs


def _sd3(config: Any, batch: int) -> Inputs:
    return {
        "hidden_states": _images(config, batch), "encoder_hidden_states": torch.randn(batch, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
    }


def _flux(config: Any, batch: int) -> Inputs:
    side, tokens = 64, 512  # of the packed latents of a 1024 × 1024 image; of T5
    inputs: Inputs = {
        "hidden_states": torch.randn(batch, side * side, config.in_channels), "encoder_hidden_states": torch.randn(batch, tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim), "img_ids": torch.zeros(side * side, 3), "txt_ids": torch.zeros(tokens, 3),
    }
    return inputs | ({"guidance": torch.full((batch,), 3.5)} if config.guidance_embeds else {})


def _pixart(config: Any, batch: int) -> Inputs:
    additional = config.sample_size == 128 if config.use_additional_conditions is None else config.use_additional_conditions
    tokens = 120 if additional else 300  # alpha, sigma
    extra = {"resolution": torch.ones(batch, 2), "aspect_ratio": torch.ones(batch, 1)} if additional else {}
    return {
        "hidden_states": _images(config, batch), "encoder_hidden_states": torch.randn(batch, tokens, config.caption_channels),
        "encoder_attention_mask": torch.ones(batch, tokens), "added_cond_kwargs": extra or {"resolution": None, "aspect_ratio": None},
    }


def _dit(config: Any, batch: int) -> Inputs:
    return {"hidden_states": _images(config, batch), "class_labels": torch.randint(config.num_embeds_ada_norm, (batch,))}


def _sana(config: Any, batch: int) -> Inputs:
    return {
        "hidden_states": _images(config, batch), "encoder_hidden_states": torch.randn(batch, 300, config.caption_channels),
        "encoder_attention_mask": torch.ones(batch, 300),
    }


#: class name → (its inputs but the time, whether it is a flow)
BACKBONES: dict[str, tuple[Callable[[Any, int], Inputs], bool]] = {
    "UNet2DModel": (_unet2d, False),
    "UNet2DConditionModel": (_unet2d_condition, False),
    "SD3Transformer2DModel": (_sd3, True),
    "FluxTransformer2DModel": (_flux, True),
    "PixArtTransformer2DModel": (_pixart, False),
    "DiTTransformer2DModel": (_dit, False),
    "SanaTransformer2DModel": (_sana, True),
}


def backbone_pipeline(backbone: nn.Module, scheduler: Any = None) -> Any:
    """A pipeline that does nothing but call a backbone and its scheduler.

    Raises:
        UserError: for a class whose inputs are not known here.
    """
    from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    name = type(backbone).__name__
    if name not in BACKBONES:
        raise UserError(
            f"the inputs of {name} are not known from its config.json alone (known: {', '.join(BACKBONES)}): name the folder of its pipeline, "
            "with the config.json of its text encoders"
        )
    inputs_of, flow = BACKBONES[name]
    if scheduler is None:
        scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler()
    is_unet = name.startswith("UNet")
    config: Any = backbone.config
    dtype = next(backbone.parameters()).dtype
    state_name = next(iter(inputs_of(config, 1)))
    takes_prompts = "class_labels" not in inputs_of(config, 1) and name != "UNet2DModel"

    class BackbonePipeline(DiffusionPipeline):
        def __init__(self, unet: Any, transformer: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, transformer=transformer, scheduler=scheduler)

        def _inputs(self, count: int, seed: int) -> tuple[Tensor, Inputs]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inputs = {key: _cast(value, dtype) for key, value in inputs_of(config, count).items()}
            return inputs.pop(state_name), inputs

        def _run(self, count: int, guidance_scale: float, num_inference_steps: int) -> Any:
            doubled = guidance_scale > 1 and name != "FluxTransformer2DModel"
            latents, told = self._inputs(count, 0)
            if doubled:  # the null condition first, as Stable Diffusion has it
                told = _joined(self._inputs(count, 1)[1], told)
            self.scheduler.set_timesteps(num_inference_steps)
            for timestep in self.scheduler.timesteps:
                state = torch.cat([latents, latents]) if doubled else latents
                time = timestep.expand(len(state)) / (1000 if name == "FluxTransformer2DModel" else 1)
                out = backbone(**{state_name: state, "timestep": time, **told}).sample[:, : latents.shape[1]]
                if doubled:
                    null, conditional = out.chunk(2)
                    out = null + guidance_scale * (conditional - null)
                latents = self.scheduler.step(out, timestep, latents).prev_sample
            return (latents,)

    class FromPrompts(BackbonePipeline):
        def __call__(self, prompt: Any = None, num_inference_steps: int = 50, guidance_scale: float = 1.0, output_type: str = "pt") -> Any:
            return self._run(1 if isinstance(prompt, str) else len(prompt), guidance_scale, num_inference_steps)

    class FromClasses(BackbonePipeline):
        def __call__(self, class_labels: Any = None, num_inference_steps: int = 50, guidance_scale: float = 1.0, output_type: str = "pt") -> Any:
            return self._run(len(class_labels), guidance_scale, num_inference_steps)

    class Unconditional(BackbonePipeline):
        def __call__(self, batch_size: int = 1, num_inference_steps: int = 50, output_type: str = "pt") -> Any:
            return self._run(batch_size, 1.0, num_inference_steps)

    cls = FromPrompts if takes_prompts else FromClasses if "class_labels" in inputs_of(config, 1) else Unconditional
    return cls(backbone if is_unet else None, None if is_unet else backbone, scheduler)


def _joined(a: Inputs, b: Inputs) -> Inputs:
    def join(key: str, x: Any, y: Any) -> Any:
        if isinstance(x, dict):
            return _joined(x, y)
        return x if x is None or key in ("img_ids", "txt_ids") else torch.cat([x, y])

    return {key: join(key, value, b[key]) for key, value in a.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
