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

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype  # type: ignore[no-any-return]

    def decode(self, x0: Tensor) -> Tensor:
        """(batch, *shape) → the decoder's output, in [−1, 1] for images."""
        device = next(self.module.parameters()).device
        flat = x0.to(device).float().flatten(1)[:, self.index.to(device)] * self.scale.to(device) + self.shift.to(device)
        z = flat.reshape(len(x0), *self.z_shape).to(self.dtype)
        takes = inspect.signature(self.module.decode).parameters
        plain = {"return_dict": False} if "return_dict" in takes else {}
        return first_tensor(self.module.decode(z, **self.settings, **plain))

    def encode(self, images: Tensor) -> Tensor:
        """Images in [−1, 1] → (batch, *shape): the mean of the encoder's distribution, laid out as the pipeline's samples.

        Raises:
            ValueError: if the decoder sees only a part of a sample, so that the way back is not defined.
        """
        if self.index.numel() != torch.Size(self.shape).numel() or len(self.index.unique()) != self.index.numel():
            raise ValueError("the decoder sees only a part of a sample")
        device = next(self.module.parameters()).device
        pixels = images.to(device, self.dtype)
        if len(self.z_shape) == 4 and pixels.dim() == 4:  # a video autoencoder: one frame
            pixels = pixels.unsqueeze(2)
        encoded = self.module.encode(pixels)
        distribution = getattr(encoded, "latent_dist", None)
        z = distribution.mode() if distribution is not None else first_tensor(encoded)
        flat = (z.reshape(len(images), -1).float() - self.shift.to(device)) / self.scale.to(device)
        x0 = torch.empty_like(flat)
        x0[:, self.index.to(device)] = flat
        return x0.reshape(len(images), *self.shape)


def find_autoencoder(pipeline: Any, shape: tuple[int, ...], run: Callable[[Tensor], None], device: torch.device, dtype: torch.dtype) -> Autoencoder | None:
    """Probe a pipeline's way from samples to its decoder; None if it has none, or one that is not of this form.

    Args:
        run: runs the pipeline such that its sampling loop results in the given (1, *shape) sample.
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
    return Autoencoder(module, shape, tuple(zeros.z.shape[1:]), index, scale.float(), shift.float(), zeros.settings)
