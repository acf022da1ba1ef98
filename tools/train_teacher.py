"""Train the class-conditional digits teacher that ships in assets/digits-teacher.

    python tools/train_teacher.py --out assets/digits-teacher --steps 5000

A small UNet learns v = alpha noise − sigma x0 on the training part of the digits, class ids 0…9, 10 for "no class".
The schedule is a cosine one rescaled to zero terminal SNR: at the last step the input is nothing but noise, so that
a one-step student starts from a network that answers there with x0 = −v, divided by nothing. The weights saved are the
moving average; the loss on the held-out images is printed beside that on the training images, to see memorisation.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from distill.data.digits import CLASSES, NULL_CLASS, Split, load_digits
from distill.export import carry_code
from distill.loading import shipped_pipeline

SPLITS: tuple[Split, ...] = ("train", "heldout")


def build_unet() -> UNet2DModel:
    """A 0.44 M parameter UNet on 8×8 and 4×4, with attention at 4×4."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=CLASSES + 1,
        dropout=0.1,
    )


def build_scheduler() -> DDIMScheduler:
    """1,000 steps of a cosine schedule with zero terminal SNR; samplers start from its very last step."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def v_loss(unet: UNet2DModel, scheduler: DDIMScheduler, x0: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
    """Mean squared error of the v-prediction at the given (batch,) steps."""
    noise = torch.randn_like(x0)
    x_t = scheduler.add_noise(x0, noise, steps)
    return (unet(x_t, steps, class_labels=labels).sample - scheduler.get_velocity(x0, noise, steps)).square().mean()


def stratified_steps(count: int, train_steps: int) -> Tensor:
    """(count,) time steps, one in each of `count` equal parts of the range: uniform, with less variance."""
    return ((torch.arange(count) + torch.rand(count)) / count * train_steps).long().clamp_max(train_steps - 1)


@torch.no_grad()
def fixed_loss(unet: UNet2DModel, scheduler: DDIMScheduler, split: Split) -> float:
    """The v-loss on a fixed draw of times and noises, without disturbing the training's own random numbers."""
    images, labels = load_digits(split)
    was_training = unet.training
    unet.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
        steps = stratified_steps(len(images), scheduler.config.num_train_timesteps)
        loss = v_loss(unet, scheduler, images, labels, steps[torch.randperm(len(steps))]).item()
    unet.train(was_training)
    return loss


def train(
    steps: int, seed: int, batch_size: int = 128, lr: float = 2e-3, ema_decay: float = 0.999, null_rate: float = 0.1
) -> tuple[UNet2DModel, DDIMScheduler]:
    """The moving average of a UNet trained for `steps` steps, and its scheduler."""
    torch.manual_seed(seed)
    images, labels = load_digits("train")
    unet, scheduler = build_unet(), build_scheduler()
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0) * (1 - step / steps) ** 0.5
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (batch_size,))
        y = torch.where(torch.rand(batch_size) < null_rate, NULL_CLASS, labels[chosen])
        t = stratified_steps(batch_size, scheduler.config.num_train_timesteps)
        loss = v_loss(unet, scheduler, images[chosen], y, t)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
        if step % 1000 == 0 or step == steps:
            parts = ", ".join(f"{split} {fixed_loss(ema, scheduler, split):.4f}" for split in SPLITS)
            print(f"step {step}  {time.monotonic() - started:.0f} s  v-loss of the average: {parts}", flush=True)
    return ema, scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/digits-teacher"), help="folder to write")
    parser.add_argument("--steps", type=int, default=5000, help="training steps of 128 images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unet, scheduler = train(arguments.steps, arguments.seed)
    pipeline = shipped_pipeline("UNet2DPipeline")(unet, scheduler, num_inference_steps=50, guidance_scale=1.0, null_class=NULL_CLASS)
    pipeline.save_pretrained(arguments.out, safe_serialization=True)
    carry_code(arguments.out, "UNet2DPipeline")
    print(f"wrote {arguments.out} ({sum(p.numel() for p in unet.parameters()):,} parameters)")


if __name__ == "__main__":
    main()
