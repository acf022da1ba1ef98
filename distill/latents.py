"""From samples to images and back, by what the pipeline itself hands to its autoencoder.

The map from a pipeline's samples to its decoder's input is, for every latent pipeline, a permutation (unpacking of tokens
or patches) and a scale and shift per element (``scaling_factor``, ``shift_factor``, means and standard deviations per
channel). So three kinds of made-up samples tell it whole: zeros (the shift), ones (the scale) and digits of each
element's number (the permutation).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.call import first_tensor

BASE = 16  #: of the digits: small whole numbers survive any precision


class Decoding(Exception):
    """Raised inside a pipeline when it calls its decoder: carries the autoencoder and its input."""

    def __init__(self, name: str, z: Tensor, settings: dict[str, Any]) -> None:
        super().__init__(name)
        self.name, self.z, self.settings = name, z, settings


@contextmanager
def caught_decoding(pipeline: Any) -> Iterator[None]:
    """``Decoding`` is raised in the block as soon as the pipeline decodes something."""
    replaced: list[Any] = []
    try:
        for name, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module) and callable(getattr(component, "decode", None)) and callable(getattr(component, "encode", None)):
                module: Any = component
                module.decode = _raising(name, module.decode)
                replaced.append(module)
        yield
    finally:
        for component in replaced:
            del component.decode


def _raising(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def decode(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        first, *_ = bound.arguments
        settings = {k: v for k, v in bound.arguments.items() if k not in (first, "return_dict", "kwargs")}
        raise Decoding(name, bound.arguments[first].detach().clone(), settings)

    return decode


@dataclass
class Autoencoder:
    """z = scale · x0[index] + shift, and the component that turns z into images."""

    module: Any
    shape: tuple[int, ...]  #: of one sample, x0
    z_shape: tuple[int, ...]
    index: Tensor
    scale: Tensor
    shift: Tensor
    settings: dict[str, Any]  #: further arguments of ``decode``
    image_scale: float = 0.5  #: images in [0, 1] = image_scale · the decoder's output + image_shift
    image_shift: float = 0.5

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype  # type: ignore[no-any-return]

    def decode(self, x0: Tensor) -> Tensor:
        """(batch, *shape) → images, in [−1, 1] (unless the network oversteps)."""
        device = next(self.module.parameters()).device
        flat = x0.to(device).float().flatten(1)[:, self.index.to(device)] * self.scale.to(device) + self.shift.to(device)
        z = flat.reshape(len(x0), *self.z_shape).to(self.dtype)
        takes = inspect.signature(self.module.decode).parameters
        plain = {"return_dict": False} if "return_dict" in takes else {}
        decoded = first_tensor(self.module.decode(z, **self.settings, **plain))
        if (self.image_scale, self.image_shift) == (0.5, 0.5):
            return decoded
        return 2 * (self.image_scale * decoded.float() + self.image_shift) - 1

    def encode(self, images: Tensor) -> Tensor:
        """Images in [−1, 1] → (batch, *shape): the mean of the encoder's distribution, laid out as the pipeline's samples.

        Raises:
            ValueError: if the decoder sees only a part of a sample, so that the way back is not defined.
        """
        if self.index.numel() != torch.Size(self.shape).numel() or len(self.index.unique()) != self.index.numel():
            raise ValueError("the decoder sees only a part of a sample")
        device = next(self.module.parameters()).device
        pixels = (((images.to(device) + 1) / 2 - self.image_shift) / self.image_scale).to(self.dtype)
        if len(self.z_shape) == 4 and pixels.dim() == 4:  # a video autoencoder: one frame
            pixels = pixels.unsqueeze(2)
        encoded = self.module.encode(pixels)
        distribution = getattr(encoded, "latent_dist", None)
        z = distribution.mode() if distribution is not None else first_tensor(encoded)
        flat = (z.reshape(len(images), -1).float() - self.shift.to(device)) / self.scale.to(device)
        x0 = torch.empty_like(flat)
        x0[:, self.index.to(device)] = flat
        return x0.reshape(len(images), *self.shape)


def find_autoencoder(pipeline: Any, shape: tuple[int, ...], run: Callable[[Tensor], Any], device: torch.device, dtype: torch.dtype) -> Autoencoder | None:
    """Probe a pipeline's way from samples to its decoder; None if it has none, or one that is not of this form.

    Args:
        run: runs the pipeline such that its sampling loop results in the given (1, *shape) sample; answers what it returned,
            images as arrays.
    """
    count = torch.Size(shape).numel()

    def reach(values: Tensor) -> Decoding | None:
        try:
            with caught_decoding(pipeline):
                run(values.reshape(1, *shape).to(device, dtype))
        except Decoding as reached:
            return reached
        return None

    zeros = reach(torch.zeros(count))
    ones = reach(torch.ones(count))
    if zeros is None or ones is None or len(zeros.z) != 1:
        return None
    shift = zeros.z.flatten().double().cpu()
    scale = ones.z.flatten().double().cpu() - shift
    if bool((scale == 0).any()):
        return None
    index = torch.zeros(scale.numel(), dtype=torch.long)
    number, place = torch.arange(count), 1
    while place < count:
        reached = reach(((number // place) % BASE).float())
        assert reached is not None
        digit = (reached.z.flatten().double().cpu() - shift) / scale
        if float((digit - digit.round()).abs().max()) > 0.2:
            return None  # not an affine map of single elements
        index += digit.round().long() * place
        place *= BASE
    if bool((index < 0).any()) or bool((index >= count).any()):
        return None
    module = pipeline.components[zeros.name]
    image_scale, image_shift = _image_range(module, zeros.z.dim(), lambda: run(torch.zeros(1, *shape, device=device, dtype=dtype)))
    return Autoencoder(module, shape, tuple(zeros.z.shape[1:]), index, scale.float(), shift.float(), zeros.settings, image_scale, image_shift)


def _image_range(module: Any, dims: int, run: Callable[[], Any]) -> tuple[float, float]:
    """Scale and shift from a decoder's output to the pipeline's images in [0, 1]: most decoders answer in [−1, 1], some in
    [0, 1]. Found by two made-up answers, in the two halves of one small picture."""
    from diffusers.models.autoencoders.vae import DecoderOutput

    low, high, size = 0.25, 0.5, 8
    picture = torch.full((1, 3, *(1,) * (dims - 4), size, size), low)
    picture[..., size // 2 :] = high

    def decode(z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        answer = picture.to(z).expand(len(z), *picture.shape[1:])
        return DecoderOutput(sample=answer) if return_dict else (answer,)

    module.decode = decode
    try:
        images = as_images(run())
    except Exception:  # a pipeline that does more with its decoder's answer than this: as most do, then
        images = None
    finally:
        del module.decode
    if images is None or images.shape[-2:] != (size, size):
        return 0.5, 0.5
    left, right = float(images[..., : size // 2].mean()), float(images[..., size // 2 :].mean())
    scale = (right - left) / (high - low)
    found = round(scale, 2), round(left - scale * low, 2)
    return found if found[0] > 0 else (0.5, 0.5)


def as_images(output: Any) -> Tensor | None:
    """A pipeline's "np" output as (batch, channels, height, width) in [0, 1], videos with their frames in the batch; None
    where it is something else."""
    value = output[0] if isinstance(output, tuple) else next((getattr(output, n) for n in ("images", "frames") if hasattr(output, n)), None)
    if not isinstance(value, (np.ndarray, Tensor)) or value.ndim < 4:
        return None
    return torch.as_tensor(value).float().flatten(0, -4).movedim(-1, -3)
