"""The reference numbers of the digits: what the teacher reaches, and what real images reach, in the digits metric.

python tools/measure_digits.py --teacher assets/digits-teacher --features assets/digits-features.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from distill.data.digits import CLASSES, NULL_CLASS, SHAPE, load_digits
from distill.evaluate.digits import accuracy, features, load_features
from distill.evaluate.frechet import density_coverage, frechet_distance, kernel_distance, precision_recall


@torch.no_grad()
def sample(folder: Path, count: int, steps: int, guidance: float, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 1, 8, 8) DDIM samples of equally many of each class, and their labels."""
    unet = UNet2DModel.from_pretrained(folder / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    done = []
    for x, y in zip(noise.split(500), labels.split(500), strict=True):
        for t in scheduler.timesteps:
            prediction = unet(x, t, class_labels=y).sample
            if guidance != 1:
                null = unet(x, t, class_labels=torch.full_like(y, NULL_CLASS)).sample
                prediction = null + guidance * (prediction - null)
            x = scheduler.step(prediction, t, x).prev_sample
        done.append(x)
    return torch.cat(done).clamp(-1, 1), labels


def divide(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random indices of `share` of each class, and of the rest: every class keeps its weight on both sides."""
    first, rest = [], []
    for label in range(CLASSES):
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(len(members) * share)
        first.append(members[:cut])
        rest.append(members[cut:])
    return torch.cat(first), torch.cat(rest)


def draw(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random indices with replacement, equally many of each class."""
    members = [(labels == label).nonzero().squeeze(1) for label in range(CLASSES)]
    return torch.cat([m[torch.randint(len(m), (count // CLASSES,), generator=generator)] for m in members])


def floors(train: Tensor, labels: Tensor, heldout: Tensor, count: int, repeats: int = 50) -> dict[str, float]:
    """Fréchet distances between features of real images, by the constructions that assets/README.md explains."""
    generator = torch.Generator().manual_seed(0)
    n, m = len(train), len(heldout)
    halves, parts, draws = 0.0, 0.0, 0.0
    for _ in range(repeats):
        first, rest = divide(labels, 0.5, generator)
        halves += frechet_distance(train[first], train[rest]) / repeats
        first, rest = divide(labels, m / n, generator)
        parts += frechet_distance(train[first], train[rest]) / repeats
        draws += frechet_distance(train[draw(labels, count, generator)], train) / repeats
    return {
        f"one half of the training images to the other ({n // 2} each)": halves,
        f"{m} training images to the other {n - m}": parts,
        f"the {m} held-out images to the {n} training images": frechet_distance(heldout, train),
        f"{count} draws with replacement from the training images, to them": draws,
        f"a perfect sampler's {count} to the {n} (the halves, scaled by 1/N)": halves * (1 / n + 1 / count) / (4 / n),
    }


def nearest(images: Tensor, train: Tensor) -> float:
    """Median distance, over all pixels, of an image to the training image nearest to it: near 0 for copies."""
    return torch.cdist(images.flatten(1), train.flatten(1)).min(1).values.median().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("assets/digits-teacher"))
    parser.add_argument("--features", type=Path, default=Path("assets/digits-features.safetensors"))
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="DDIM steps to measure")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()

    network = load_features(arguments.features)
    (train_images, train_labels), (heldout_images, heldout_labels) = load_digits("train"), load_digits("heldout")
    train, heldout = features(network, train_images), features(network, heldout_images)
    for name, distance in floors(train, train_labels, heldout, arguments.samples).items():
        print(f"{distance:7.3f}  {name}")
    print(f"{accuracy(network, heldout_images, heldout_labels):7.4f}  accuracy on the held-out images")
    print(f"{nearest(heldout_images, train_images):7.3f}  from a held-out image to the nearest training image (median)")
    for steps in arguments.steps:
        for seed in arguments.seeds:
            images, labels = sample(arguments.teacher, arguments.samples, steps, arguments.guidance, seed)
            fake = features(network, images)
            kernel = kernel_distance(fake, train)
            precision, recall = precision_recall(train, fake[: len(train)])
            density, coverage = density_coverage(train, fake[: len(train)])
            print(
                f"teacher, {steps} steps, guidance {arguments.guidance:g}, seed {seed}: "
                f"Fréchet to training {frechet_distance(fake, train):.3f}, to held-out "
                f"{frechet_distance(fake, heldout):.3f}, "
                f"kernel {1000 * kernel.mean:.2f}e-3 ± {1000 * kernel.std:.2f}e-3, "
                f"accuracy {accuracy(network, images, labels):.4f}, precision {precision:.3f}, recall {recall:.3f}, "
                f"density {density:.3f}, coverage {coverage:.3f}, "
                f"nearest training image {nearest(images, train_images):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
