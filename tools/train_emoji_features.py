"""Train the network of the emoji metrics that ships in assets/emoji-features.safetensors.

    python tools/train_emoji_features.py --data ../shared/data/emoji --steps 600

An image and its caption attract, an image and the other captions of the batch repel. The batch is drawn evenly over base
emoji, images are moved, scaled and tinted at random, and each caption is one of the emoji's two names.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from emoji_data import read_images, read_rows
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from distill.data.emoji import balance
from distill.evaluate.emoji import EmojiNet, cosines, features
from distill.evaluate.frechet import Gaussian, frechet_distance, moments


def augment(images: Tensor, shift: float = 0.12, scale: float = 0.12, tint: float = 0.06, noise: float = 0.04) -> Tensor:
    """Random moves (in units of half the image), sizes, tints and noise of (N, 3, H, W) images on white in [0, 1]."""
    count = len(images)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + scale * (torch.rand(count) * 2 - 1)
    theta[:, :, 2] = shift * (torch.rand(count, 2) * 2 - 1)
    moved = F.grid_sample(images - 1, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False) + 1
    tinted = moved * (1 + tint * torch.randn(count, 3, 1, 1))
    return (tinted + noise * torch.rand(count, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)


def train(images: Tensor, rows: list[dict[str, str]], steps: int, batch_size: int = 192, lr: float = 2e-3) -> EmojiNet:
    """A network of (N, 3, 64, 64) images in [0, 1] and their rows."""
    network, weights = EmojiNet(), balance(rows)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    smooth = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 100, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.multinomial(weights, batch_size)
        names = [rows[i]["short" if use_short else "caption"] for i, use_short in zip(chosen.tolist(), torch.rand(batch_size) < 0.25, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            a = network.embed_images(augment(images[chosen]))
        a, b = F.normalize(a.float(), dim=1), F.normalize(network.embed_captions(names), dim=1)
        logits = network.log_scale.clamp_max(4.0).exp() * a @ b.T
        number = torch.tensor([names.index(name) for name in names])
        same = (number[:, None] == number).float()  # equal names are no opposites
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        smooth += (loss.item() - smooth) * max(0.02, 1 / (step + 1))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {smooth:.3f}", flush=True)
    return network.eval().requires_grad_(False)


def retrieval(network: EmojiNet, images: Tensor, captions: list[str]) -> str:
    """How often an image's own caption is the nearest of all, and among the five nearest; the mean cosine."""
    table = cosines(network, images, captions)
    rank = (table > table.diagonal()[:, None]).sum(1)
    return f"own caption first {(rank == 0).float().mean():.3f}, in the first five {(rank < 5).float().mean():.3f}, mean cosine {table.diagonal().mean():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/emoji"), help="folder with captions.jsonl and emoji64.tar")
    parser.add_argument("--out", type=Path, default=Path("assets/emoji-features.safetensors"), help="file to write")
    parser.add_argument("--steps", type=int, default=600, help="training steps of 192 images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rows = read_rows(arguments.data)
    images = read_images(arguments.data, rows).float() / 255
    part = {split: [i for i, row in enumerate(rows) if row["split"] == split] for split in ("train", "heldout")}
    network = train(images[part["train"]], [rows[i] for i in part["train"]], arguments.steps)
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    found: dict[str, Gaussian] = {}
    for split, indices in part.items():
        found[split] = moments(features(network, images[indices]))
        getattr(network, f"{split}_mean").copy_(found[split].mean)
        getattr(network, f"{split}_covariance").copy_(found[split].covariance)
        print(f"{split}: {retrieval(network, images[indices], [rows[i]['caption'] for i in indices])}")
    print(f"Fréchet distance of the held-out images to the training images: {frechet_distance(found['train'], found['heldout']):.3f}")
    halves = moments(features(network, images[part["train"][::2]])), moments(features(network, images[part["train"][1::2]]))
    print(f"of one half of the training images to the other: {frechet_distance(*halves):.3f}")
    exact = [name for name in network.state_dict() if name.startswith(("train_", "heldout_"))]  # moments stay in full precision
    save_file({name: value.contiguous() if name in exact else value.half().contiguous() for name, value in network.state_dict().items()}, arguments.out)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
