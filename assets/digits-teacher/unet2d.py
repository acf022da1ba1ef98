"""A pixel-space pipeline for a `UNet2DModel`, unconditional or class-conditional. Needs diffusers alone (and peft, for LoRAs).

Load it with

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)   # runs this file, which lies in `folder`

`pipe(class_labels=[3, 7])` samples with the number of steps and the guidance that the weights were made for: they are
part of the pipeline's configuration. The sampler is the scheduler's (DDIM for a teacher; for a few-step student the
LCM scheduler, which re-noises at the trained timesteps).
"""

from __future__ import annotations

import os
import re

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file

try:
    from peft import LoraConfig, inject_adapter_in_model
except ImportError:  # only load_lora_weights needs it
    LoraConfig = inject_adapter_in_model = None


class UNet2DPipeline(DiffusionPipeline):
    """Sample images (values in [-1, 1] inside, [0, 1] outside) from a `UNet2DModel`.

    Args:
        unet: the backbone; with `num_class_embeds` it is class-conditional.
        scheduler: any diffusers scheduler whose `step` takes (model_output, timestep, sample).
        num_inference_steps: default number of network calls per sample.
        guidance_scale: default guidance scale w in D_null + w (D_class - D_null); 1 is off.
        null_class: the class index that means "no class"; None where the backbone has none (no guidance then).
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler, num_inference_steps=50, guidance_scale=1.0, null_class=None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, null_class=null_class
        )

    def load_lora_weights(self, folder):
        """Put a LoRA on the backbone: `pytorch_lora_weights.safetensors` of a folder (a path), at its trained strength.

        Sample then with the scheduler that lies beside it:
        `pipe.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")`.
        """
        if LoraConfig is None:
            raise ImportError("load_lora_weights needs peft: pip install peft")
        weights = load_file(os.path.join(folder, "pytorch_lora_weights.safetensors"))
        weights = {name.removeprefix("unet."): value for name, value in weights.items()}
        down = {name.removesuffix(".lora_A.weight"): value for name, value in weights.items() if ".lora_A." in name}
        config = LoraConfig(
            r=1, lora_alpha=1, target_modules=sorted(down), init_lora_weights=False,
            rank_pattern={f"^{re.escape(name)}$": len(value) for name, value in down.items()},
            alpha_pattern={f"^{re.escape(name)}$": len(value) for name, value in down.items()},
        )
        inject_adapter_in_model(config, self.unet, adapter_name="default")
        own = {name: p for name, p in self.unet.named_parameters() if ".lora_" in name}
        given = {re.sub(r"(lora_[AB])\.", r"\1.default.", name): value for name, value in weights.items()}
        if own.keys() != given.keys():
            raise ValueError(f"the LoRA does not fit this backbone: {sorted(own.keys() ^ given.keys())[:3]} …")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(given[name]).requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        batch_size=None,
        num_inference_steps=None,
        guidance_scale=None,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Generate one image per class label (or `batch_size` images from an unconditional backbone).

        Args:
            class_labels: list or tensor of class indices, one per image.
            num_inference_steps, guidance_scale: override the defaults of this pipeline.
            generator: source of the noise; equal seeds give equal images.
            latents: initial noise of unit variance, (batch, channels, height, width); drawn if not given.
            output_type: "pil", "np" (batch, height, width, channels), "pt" (batch, channels, height, width) in [0, 1],
                or "latent": what the scheduler left, unclamped, around [-1, 1].
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        null_class = self.config.null_class
        conditional = self.unet.config.num_class_embeds is not None
        if conditional and class_labels is None:
            raise ValueError("this backbone is class-conditional: pass class_labels, one per image")
        if not conditional and class_labels is not None:
            raise ValueError("this backbone is unconditional: pass batch_size in place of class_labels")
        device, dtype = self._execution_device, self.unet.dtype
        if conditional:
            class_labels = torch.as_tensor(class_labels, device=device, dtype=torch.long).reshape(-1)
            batch_size = len(class_labels)
        batch_size = batch_size or 1
        guided = conditional and null_class is not None and scale != 1

        size = self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if latents is None:
            latents = randn_tensor((batch_size, self.unet.config.in_channels, *size), generator, device, dtype)
        self.scheduler.set_timesteps(steps, device=device)
        image = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        extra = {}
        if guided:
            class_labels = torch.cat([torch.full_like(class_labels, null_class), class_labels])
        if conditional:
            extra["class_labels"] = class_labels
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([image, image]) if guided else image, t)
            output = self.unet(model_input, t, **extra).sample
            if guided:
                null, cond = output.chunk(2)
                output = null + scale * (cond - null)
            image = self.scheduler.step(output, t, image, generator=generator).prev_sample

        if output_type != "latent":
            image = (image / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            image = image.float().cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
