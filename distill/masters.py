"""Float32 weights of a network that computes in half precision.

A step of 1e-5 on a weight of 1 is far less than bfloat16 can hold (its next number is 0.0078 away): rounded to the nearest it
is lost, at every step. So what is trained is kept in float32, and each forward runs on a copy in the teacher's own dtype
(Micikevicius et al. 2018, arXiv 1710.03740, sec. 3.1). The network computes as the teacher's does and as the exported
student will; gradients, their sums and the optimizer's states are float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class Masters:
    """The trained parameters of a backbone, replaced by ones in float32, in whose places a forward finds them cast back.

    By replacing the tensors and not by autocast: layers that mix trained and frozen weights see one dtype, on any device.
    """

    def __init__(self, backbone: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        wide = {id(p): nn.Parameter(p.detach().float(), p.requires_grad) for p in trained if p.dtype in HALF}
        #: where each stands (a tied weight stands in several places), and the dtype of its casts
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._dtypes: dict[int, torch.dtype] = {}
        for module in backbone.modules():
            for leaf, p in module._parameters.items():
                if p is not None and id(p) in wide:
                    self._places.append((module, leaf, wide[id(p)]))
                    self._dtypes[id(wide[id(p)])] = p.dtype
        self._put(None)
        self.active: dict[int, Tensor] | None = None  #: the casts that are in place now

    def __bool__(self) -> bool:
        return bool(self._places)

    @contextmanager
    def using(self, casts: dict[int, Tensor] | None = None) -> Iterator[None]:
        """Casts in the places of the weights: new ones, through which gradients reach the weights; or those of an earlier
        forward, of which a block is computed again."""
        before, self.active = self.active, self._cast() if casts is None else casts
        self._put(self.active)
        try:
            yield
        finally:
            self.active = before
            self._put(before)

    def _cast(self) -> dict[int, Tensor]:
        return {id(p): p.to(self._dtypes[id(p)]) for _, _, p in self._places}

    def _put(self, casts: dict[int, Tensor] | None) -> None:
        for module, leaf, parameter in self._places:
            module._parameters[leaf] = parameter if casts is None else casts[id(parameter)]  # type: ignore[assignment]

    @torch.no_grad()
    def narrow_copy(self, backbone: nn.Module) -> nn.Module:
        """A copy of the backbone in the dtypes that it computes in: what is exported."""
        cast = {id(p): nn.Parameter(p.to(self._dtypes[id(p)]), requires_grad=False) for _, _, p in self._places}
        return copy.deepcopy(backbone, dict(cast))
