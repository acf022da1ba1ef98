"""The numbers in assets/README.md about the emoji teacher, and pictures to look at.

    python tools/measure_emoji.py numbers                       # Fréchet distance, caption score and speed by guidance
    python tools/measure_emoji.py guidance --out guidance.png   # one caption a column, one guidance scale a row
    python tools/measure_emoji.py compare --students runs/a/student:1 runs/b/student:4 --out assets/readme/emoji.png

`numbers` needs nothing but the assets: the reference is the real emoji's moments in assets/emoji-features.safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from distill.data.emoji import load_emoji, load_emoji_rows
from distill.evaluate.emoji import emoji_clip, fd_emoji
from distill.evaluate.generate import Images, generate
from distill.evaluate.grid import comparison_grid
from distill.loading import load_pipeline

STEPS = 50
SCALES = (1.0, 2.0, 3.0, 4.0, 7.0)


def quiet(folder: str | Path) -> StableDiffusionPipeline:
    pipeline: StableDiffusionPipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def of_student(entry: str, captions: list[str], seed: int) -> tuple[str, int, Images]:
    """(name of the run, steps, samples) of a student given as FOLDER:STEPS; its guidance is folded in."""
    folder, _, steps = entry.rpartition(":")
    made = generate(quiet(folder), captions, steps=int(steps), guidance_scale=1.0, batch_size=64, seed=seed)
    return Path(folder).parent.name, int(steps), made


@torch.no_grad()
def decoded(pipeline: StableDiffusionPipeline, latents: Tensor, captions: list[str]) -> Images:
    """What the autoencoder makes of the data's own latents: the ceiling of any sampler in them."""
    parts = [pipeline.vae.decode(chunk / pipeline.vae.config.scaling_factor).sample for chunk in latents.split(64)]
    return Images((torch.cat(parts) / 2 + 0.5).clamp(0, 1), captions, 0.0, 0.0)


def one_of_each_base(split: Any) -> list[str]:
    """One caption per base emoji: without the skin tones, which are most of the data."""
    rows = load_emoji_rows(split)
    return list({row["base"]: row["caption"] for row in reversed(rows)}.values())[::-1]


def line(name: str, images: Images) -> None:
    distances, score = fd_emoji(images, None), emoji_clip(images, None)["emoji_clip"]
    speed = f"{images.images_per_second:6.2f} images/s" if images.images_per_second else ""
    both = f"FD to training {distances['fd_emoji']:7.2f}, to held-out {distances['fd_emoji_heldout']:7.2f}"
    print(f"{name:44s} {both}, caption score {score:.3f}  {speed}", flush=True)


def numbers(arguments: argparse.Namespace) -> None:
    pipeline = quiet(arguments.teacher)
    chosen: dict[str, list[str]] = {}
    for split in ("train", "heldout"):
        latents, texts = load_emoji(split)  # type: ignore[arg-type]
        every = -(-len(texts) // arguments.samples)
        chosen[split] = texts[::every]
        line(f"{split} latents, decoded ({len(texts)})", decoded(pipeline, latents, texts))
        if every > 1:  # a Fréchet distance depends on the count: the same for the same number of images
            line(f"{split} latents, decoded ({len(chosen[split])})", decoded(pipeline, latents[::every], chosen[split]))
    for entry in arguments.students:
        for split, texts in chosen.items():
            name, steps, made = of_student(entry, texts, arguments.seed)
            line(f"{name}, {steps} steps, {split} captions ({len(texts)})", made)
    for scale in arguments.scales:
        for split, texts in chosen.items():
            made = generate(pipeline, texts, steps=STEPS, guidance_scale=scale, batch_size=64, seed=arguments.seed)
            line(f"guidance {scale:g}, {split} captions ({len(texts)})", made)


def guidance(arguments: argparse.Namespace) -> None:
    pipeline, captions = quiet(arguments.teacher), []
    for split in ("train", "heldout"):
        every = one_of_each_base(split)
        captions += every[:: max(1, len(every) // 12)][:12]
    rows = []
    for scale in SCALES:
        made = generate(pipeline, captions, steps=STEPS, guidance_scale=scale, batch_size=64, seed=arguments.seed)
        rows.append((f"guidance {scale:g} (left half: training captions, right half: held-out)", made.images))
    comparison_grid(rows, columns=24, cell=64).save(arguments.out)
    print("\n".join(captions))


def compare(arguments: argparse.Namespace) -> None:
    captions = one_of_each_base(arguments.split)
    captions = captions[:: max(1, len(captions) // arguments.count)][: arguments.count]
    made = generate(quiet(arguments.teacher), captions, steps=STEPS, guidance_scale=arguments.scale, batch_size=64, seed=arguments.seed)
    rows = [(f"teacher: {STEPS} steps, guidance {arguments.scale:g} ({2 * STEPS} calls)", made.images)]
    for entry in arguments.students:
        name, steps, made = of_student(entry, captions, arguments.seed)
        rows.append((f"student: {steps} step{'s' if steps != 1 else ''} ({name})", made.images))
    comparison_grid(rows, columns=16, cell=64).save(arguments.out)
    print("\n".join(captions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = {"numbers": numbers, "guidance": guidance, "compare": compare}
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--teacher", type=Path, default=Path("assets/emoji-teacher"))
    parser.add_argument("--students", nargs="+", default=[], metavar="FOLDER:STEPS")
    parser.add_argument("--samples", type=int, default=500, help="numbers: captions of each part, at most so many")
    parser.add_argument("--scales", type=float, nargs="*", default=SCALES, help="numbers: guidance scales")
    parser.add_argument("--split", choices=("train", "heldout"), default="heldout", help="compare: whose captions")
    parser.add_argument("--count", type=int, default=64, help="compare: captions")
    parser.add_argument("--scale", type=float, default=3.0, help="compare: the teacher's guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("emoji.png"))
    arguments = parser.parse_args()
    jobs[arguments.job](arguments)


if __name__ == "__main__":
    main()
