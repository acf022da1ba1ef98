"""Train the feature network of the digits metric that ships in assets/digits-features.safetensors.

    python tools/train_features.py --out assets/digits-features.safetensors

A small classifier of the training images, made smooth rather than sure: small random shifts and noise, dropout, weight
decay and smoothed labels. A classifier is surer of the images that it was trained on; the less, the fairer the metric.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from distill.data.digits import Split, load_digits
from distill.evaluate.digits import DigitsNet, accuracy, features
from distill.evaluate.frechet import frechet_distance


def augment(images: Tensor, shift: float = 0.15, noise: float = 0.1) -> Tensor:
    """Random affine changes (shift in units of half the image, ±10° and ±10 % in size) and Gaussian noise."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * 0.17
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos(), -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin(), scale * angle.cos()
    theta[:, :, 2] = (torch.rand(count, 2) * 2 - 1) * shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # the background is −1
    return moved + noise * torch.rand(count, 1, 1, 1) * torch.randn_like(images)


def train(steps: int, seed: int, batch_size: int = 128, lr: float = 2e-3) -> DigitsNet:
    """A classifier of the training images, its features standardised on them."""
    torch.manual_seed(seed)
    images, labels = load_digits("train")
    network = DigitsNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,))
        logits = network(augment(images[chosen]))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)
    network.standardise(images)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/digits-features.safetensors"), help="file to write")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 128 images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    network = train(arguments.steps, arguments.seed)
    sets = {}
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        images, labels = load_digits(split)
        sets[split] = features(network, images)
        confidence = network.logits(images).softmax(1).max(1).values.mean()
        print(f"{split}: accuracy {accuracy(network, images, labels):.4f}, mean confidence {confidence:.4f}")
    print(f"Fréchet distance of the held-out images to the training images: {frechet_distance(*sets.values()):.3f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
