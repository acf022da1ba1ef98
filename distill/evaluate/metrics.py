"""Metrics by name. Each takes generated images and answers plain numbers (and what they were measured with).

    fd-digits   Fréchet distance in the digits features; reference: the training images, the held-out ones beside it
    kid         kernel distance in the same features           accuracy    share of images classified as asked for
    accuracy-by-class  the same for each class
    precision, recall, density, coverage                       in the same features
    fd-emoji    Fréchet distance in the emoji features         emoji-clip  cosine of image and caption in the emoji network
    fid         clean-fid's FID against a folder of images     clip-score  cosine of OpenCLIP's image and text embeddings
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.checkpoint import sha256
from distill.data.digits import load_digits
from distill.data.images import SUFFIXES
from distill.errors import UserError
from distill.evaluate import digits
from distill.evaluate.emoji import emoji_clip, fd_emoji
from distill.evaluate.frechet import density_coverage, frechet_distance, kernel_distance, precision_recall
from distill.evaluate.generate import Images
from distill.imports import import_object
from distill.loading import conditioned_on
from distill.resources import resource

Numbers = dict[str, float | int | str]


@dataclass(frozen=True)
class Context:
    """What a metric may need beside the images."""

    reference: Path | None = None  #: of fid: a folder of real images
    device: str = "cpu"


Metric = Callable[[Images, Context], Numbers]


@cache
def _digits_network() -> tuple[digits.DigitsNet, Tensor, Tensor]:
    """The feature network and the features of the training and the held-out images."""
    network = digits.load_features(resource("assets/digits-features.safetensors"))
    train, heldout = (digits.features(network, load_digits(split)[0]) for split in ("train", "heldout"))  # type: ignore[arg-type]
    return network, train, heldout


def _digit_features(images: Images, least: int = 2) -> Tensor:
    """Features of at least so many 1×8×8 images."""
    if len(images.images) < least:
        raise UserError(f"{len(images.images)} samples are too few to measure: at least {least}")
    if images.images.shape[1:] != (1, 8, 8):
        size = "×".join(map(str, images.images.shape[1:]))
        raise UserError(f"the digits metrics measure 1×8×8 images, and these are {size}: use fid or clip-score")
    return digits.features(_digits_network()[0], images.images * 2 - 1)


def fd_digits(images: Images, context: Context) -> Numbers:
    _, train, heldout = _digits_network()
    made = _digit_features(images)
    return {
        "fd_digits": frechet_distance(made, train),
        "fd_digits_heldout": frechet_distance(made, heldout),
        "fd_digits_reference": f"{len(train)} training images",
        "fd_digits_features_sha256": sha256(resource("assets/digits-features.safetensors")),
    }


def kid(images: Images, context: Context) -> Numbers:
    mean, std = kernel_distance(_digit_features(images), _digits_network()[1])
    return {"kid": mean, "kid_std": std}


def accuracy(images: Images, context: Context) -> Numbers:
    _digit_features(images, 1)
    if any(not isinstance(label, int) for label in images.inputs):
        raise UserError("accuracy needs images of known classes, and this pipeline is not class-conditional")
    return {"accuracy": digits.accuracy(_digits_network()[0], images.images * 2 - 1, torch.tensor(images.inputs))}


def accuracy_by_class(images: Images, context: Context) -> Numbers:
    """The share of each class's requests that are classified as asked for: what a student forgot, and what it did not."""
    accuracy(images, context)
    asked = torch.tensor(images.inputs)
    right = digits.predictions(_digits_network()[0], images.images * 2 - 1) == asked
    return {f"accuracy_{c}": float(right[asked == c].double().mean()) for c in sorted(set(images.inputs))}


def _equal_counts(images: Images) -> tuple[Tensor, Tensor]:
    made, train = _digit_features(images, 6), _digits_network()[1]  # density and coverage look at 5 neighbours
    count = min(len(made), len(train))
    return train[:count], made[:count]


def precision(images: Images, context: Context) -> Numbers:
    return {"precision": precision_recall(*_equal_counts(images))[0]}


def recall(images: Images, context: Context) -> Numbers:
    return {"recall": precision_recall(*_equal_counts(images))[1]}


def density(images: Images, context: Context) -> Numbers:
    return {"density": density_coverage(*_equal_counts(images))[0]}


def coverage(images: Images, context: Context) -> Numbers:
    return {"coverage": density_coverage(*_equal_counts(images))[1]}


def _reference(context: Context) -> Path:
    if context.reference is None or not context.reference.is_dir():
        raise UserError("fid needs real images to compare with: --reference FOLDER")
    if not any(p.suffix.lower() in SUFFIXES for p in context.reference.rglob("*")):
        raise UserError(f"--reference {context.reference} holds no images")
    return context.reference


def fid(images: Images, context: Context) -> Numbers:
    """clean-fid, mode "clean" (Parmar et al. 2022): PNGs, antialiased bicubic resize to 299, TF-2015 Inception."""
    from torchvision.utils import save_image

    reference = _reference(context)
    if len(images.images) < 2:
        raise UserError("fid needs at least 2 samples")
    try:
        from cleanfid import fid as cleanfid

        with tempfile.TemporaryDirectory() as folder:
            for i, image in enumerate(images.images):
                save_image(image, Path(folder) / f"{i:06d}.png")
            value = cleanfid.compute_fid(
                folder, str(reference), mode="clean", num_workers=0, device=torch.device(context.device),
                use_dataparallel=False, verbose=False,
            )
    except OSError as error:  # every network error is one
        raise UserError(f"fid needs the Inception network, which could not be downloaded from here ({type(error).__name__}): go online once") from None
    return {"fid": float(value), "fid_mode": "clean", "fid_reference": reference.name}


CLIP_MODEL, CLIP_WEIGHTS = "ViT-L-14", "openai"


@torch.no_grad()
def clip_score(images: Images, context: Context) -> Numbers:
    """Mean cosine (not × 100) between each image and its prompt, OpenCLIP ViT-L/14 of OpenAI, no prefix."""
    if any(not isinstance(text, str) for text in images.inputs):
        raise UserError("clip-score compares images with their prompts, and this pipeline takes no prompts")
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    try:
        model, _, preprocess = open_clip.create_model_and_transforms(CLIP_MODEL, CLIP_WEIGHTS, device=context.device)
    except Exception as error:  # hub, network and cache errors of three libraries
        reason = type(error).__name__
        raise UserError(f"clip-score needs {CLIP_MODEL} of {CLIP_WEIGHTS}, which could not be downloaded from here ({reason}): go online once") from None
    tokenizer, total = open_clip.get_tokenizer(CLIP_MODEL), 0.0
    for start in range(0, len(images.inputs), 64):
        pictures = torch.stack([preprocess(to_pil_image(i)) for i in images.images[start : start + 64]]).to(context.device)
        texts = tokenizer(images.inputs[start : start + 64]).to(context.device)
        a, b = model.encode_image(pictures), model.encode_text(texts)
        total += float(torch.cosine_similarity(a, b).sum())
    return {"clip_score": total / len(images.inputs), "clip_model": f"{CLIP_MODEL}/{CLIP_WEIGHTS}", "clip_prefix": "", "clip_scale": 1}


METRICS: dict[str, Metric] = {
    "fd-digits": fd_digits, "kid": kid, "kid-digits": kid, "accuracy": accuracy, "accuracy-by-class": accuracy_by_class,
    "precision": precision, "recall": recall, "density": density, "coverage": coverage, "fid": fid, "clip-score": clip_score,
    "fd-emoji": fd_emoji, "emoji-clip": emoji_clip,
}


def check_metric(name: str) -> Metric:
    """The metric of a name, or of an import path ``module:function`` of the user's.

    Raises:
        UserError: if there is none; says the nearest.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" in name:
        try:
            found: Metric = import_object(name)
            return found
        except ValueError as error:
            raise UserError(f"metric {error}") from None
    close = difflib.get_close_matches(name, METRICS, 1)
    raise UserError(f"there is no metric {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(METRICS)}"))


def check_fit(name: str, pipeline: Any, context: Context) -> None:
    """Refuse what a metric cannot measure before hours of sampling, as far as it can be seen from the pipeline.

    Raises:
        UserError: if the metric does not fit the pipeline, or lacks its reference.
    """
    if name == "fid":
        _reference(context)
    elif name == "clip-score":
        if conditioned_on(pipeline) != "prompt":
            raise UserError("clip-score compares images with their prompts, and this pipeline takes no prompts")
    elif name in ("fd-emoji", "emoji-clip"):
        if conditioned_on(pipeline) != "prompt":
            raise UserError(f"{name} measures emoji made from prompts, and this pipeline takes no prompts")
    elif name in METRICS:  # the digits metrics
        config = getattr(getattr(pipeline, "unet", None), "config", {})
        size = config.get("sample_size", 8)
        if getattr(pipeline, "vae", None) is not None or config.get("in_channels", 1) != 1 or size not in (8, (8, 8), [8, 8]):
            raise UserError(f"{name} measures 1×8×8 digits, and {type(pipeline).__name__} makes other images: use fid or clip-score")
        if name.startswith("accuracy") and conditioned_on(pipeline) != "class_labels":
            raise UserError("accuracy needs images of known classes, and this pipeline is not class-conditional")


def measure(images: Images, names: Sequence[str], context: Context) -> Numbers:
    """All named metrics of one set of images.

    Raises:
        UserError: if a metric does not fit the images, or an image is not finite.
    """
    broken = int((~images.images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise UserError(f"{broken} of {len(images.images)} images hold NaN or infinite values: the network has diverged, or its dtype overflows")
    numbers: dict[str, Any] = {}
    for name in names:
        numbers |= check_metric(name)(images, context)
    return numbers
