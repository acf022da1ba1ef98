"""How one tensor of a pipeline lies inside another, found from recorded values alone.

A pipeline hands its scheduler's sample to the backbone as it is, reshaped, packed into tokens, or beside other channels
or tokens (a masked image, a reference), and takes its own part out of what comes back. The values of a recorded sample
are as good as unique, so *where* each of them went can be read off: nothing is assumed about the pipeline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Arrangement(ABC):
    """A map (batch, *source) → (batch, *target); ``rest`` (batch, *target) fills what the source does not."""

    @abstractmethod
    def __call__(self, x: Tensor, rest: Tensor | None = None) -> Tensor:
        """The source's values at their places in the target."""

    def needs_rest(self) -> bool:
        """Whether the target holds more than the source."""
        return False


@dataclass(frozen=True)
class View(Arrangement):
    """The same values in the same order."""

    shape: Shape

    def __call__(self, x: Tensor, rest: Tensor | None = None) -> Tensor:
        return x.reshape(len(x), *self.shape)


@dataclass(frozen=True)
class Part(Arrangement):
    """A slice of the source: channels of a learnt variance, tokens of a reference image are left out."""

    dim: int  #: counted with the batch
    start: int  #: from the end, if negative: behind text of any length
    length: int
    shape: Shape

    def __call__(self, x: Tensor, rest: Tensor | None = None) -> Tensor:
        start = self.start if self.start >= 0 else x.shape[self.dim] + self.start
        return x.narrow(self.dim, start, self.length).reshape(len(x), *self.shape)


@dataclass(frozen=True)
class Beside(Arrangement):
    """The source as a slice of the target, between parts of the rest."""

    dim: int  #: counted with the batch
    start: int
    shape: Shape  #: of the source as it lies in the target

    def __call__(self, x: Tensor, rest: Tensor | None = None) -> Tensor:
        assert rest is not None
        x = x.reshape(len(x), *self.shape)
        end = self.start + x.shape[self.dim]
        before, after = rest.narrow(self.dim, 0, self.start), rest.narrow(self.dim, end, rest.shape[self.dim] - end)
        return torch.cat([before.to(x), x, after.to(x)], self.dim)

    def needs_rest(self) -> bool:
        return True


@dataclass(frozen=True)
class Gather(Arrangement):
    """Any other order: target value i is source value index[i], or the rest's where index[i] is −1."""

    index: Tensor
    shape: Shape

    def __call__(self, x: Tensor, rest: Tensor | None = None) -> Tensor:
        index = self.index.to(x.device)
        taken = x.flatten(1)[:, index.clamp_min(0)]
        if self.needs_rest():
            assert rest is not None
            taken = torch.where(index >= 0, taken, rest.to(x).flatten(1))
        return taken.reshape(len(x), *self.shape)

    def needs_rest(self) -> bool:
        return bool((self.index < 0).any())


def find_inside(source: Tensor, target: Tensor) -> Arrangement | None:
    """How a source (1, ...) lies in a target (1, ...) that holds all of its values; None if it does not.

    The source is compared in the target's precision: pipelines cast before they call.
    """
    source = source.to(target.dtype)
    if source.numel() == target.numel() and torch.equal(source.reshape(target.shape), target):
        return View(tuple(target.shape[1:]))
    piece = _slice(source, target)
    if piece is not None:
        dim, start, view = piece
        return Beside(dim, start, tuple(view.shape[1:]))
    index = _match(source.flatten(), target.flatten())
    if index is None or len(index[index >= 0].unique()) < source.numel():
        return None  # a value of the source did not arrive
    return Gather(index, tuple(target.shape[1:]))


def find_part(source: Tensor, target: Tensor) -> Arrangement | None:
    """How a target (1, ...) is taken out of a source (1, ...) that may hold more; None if it is not."""
    target = target.to(source.dtype)
    if source.numel() == target.numel() and torch.equal(source.reshape(target.shape), target):
        return View(tuple(target.shape[1:]))
    piece = _slice(target, source)
    if piece is not None:
        dim, start, view = piece
        size = view.shape[dim]
        return Part(dim, start if start + size < source.shape[dim] else -size, size, tuple(target.shape[1:]))
    index = _match(source.flatten(), target.flatten())
    return None if index is None or bool((index < 0).any()) else Gather(index, tuple(target.shape[1:]))


def covers(parts: Sequence[Arrangement], source: Tensor) -> bool:
    """Whether parts of a source (1, ...) together take each of its elements once."""
    numbers = torch.arange(source.numel()).reshape(source.shape)
    taken = torch.cat([part(numbers).flatten() for part in parts])
    return torch.equal(taken.sort().values, numbers.flatten())


def _slice(small: Tensor, large: Tensor) -> tuple[int, int, Tensor] | None:
    """(dimension, start, the small tensor as it lies there), where it is one slice of the large one."""
    for view in views(small, large):
        dim = next(d for d in range(large.dim()) if view.shape[d] != large.shape[d])
        for start in range(large.shape[dim] - view.shape[dim] + 1):
            if torch.equal(large.narrow(dim, start, view.shape[dim]), view):
                return dim, start, view
    return None


def views(small: Tensor, large: Tensor) -> list[Tensor]:
    """The small tensor in the large one's number of dimensions, where they then differ in one dimension only."""
    shapes = [tuple(small.shape)]
    if small.dim() < large.dim():
        ones = large.dim() - small.dim()
        shapes = [(*small.shape[:d], *(1,) * ones, *small.shape[d:]) for d in range(1, small.dim() + 1)]
    elif small.dim() > large.dim():
        squeezed = tuple(s for i, s in enumerate(small.shape) if i == 0 or s != 1)
        shapes = [squeezed, (len(small), small[0].numel())]
    fitting = []
    for shape in shapes:
        if len(shape) == large.dim():
            differing = [d for d in range(1, len(shape)) if shape[d] != large.shape[d]]
            if len(differing) == 1 and shape[differing[0]] < large.shape[differing[0]]:
                fitting.append(small.reshape(shape))
    return fitting


def _match(source: Tensor, target: Tensor) -> Tensor | None:
    """For each target value the index of the equal source value, −1 where there is none; None if nothing matches or the
    source repeats values, so that places cannot be told apart."""
    order = source.argsort()
    sorted_source = source[order].contiguous()
    if bool((sorted_source[1:] == sorted_source[:-1]).any()):
        return None
    place = torch.searchsorted(sorted_source, target.contiguous()).clamp_max(len(source) - 1)
    found = sorted_source[place] == target
    return torch.where(found, order[place], -1) if bool(found.any()) else None
