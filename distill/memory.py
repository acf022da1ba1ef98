"""What fits a run into a smaller GPU: activations that are computed again, and weights that wait on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.denoiser import BackboneDenoiser
from distill.errors import UserError


def checkpoint_activations(backbone: nn.Module, *switches: Any) -> None:
    """Keep only each block's inputs in a forward with gradients; the rest is computed again in the backward pass.

    The second computation has to run with the weights of the first, and comes when the forward's own context has long
    been left: so what each switch (adapters, masters, embeddings of the end time) has in use is noted with the block. Hidden
    features may still be caught inside the blocks.

    Raises:
        UserError: if the backbone's class cannot do it.
    """

    def run(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = as_now(block, *switches)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    enable = getattr(backbone, "enable_gradient_checkpointing", None)
    try:
        if enable is None:
            raise ValueError
        enable(gradient_checkpointing_func=run)
    except ValueError:  # what diffusers' models say
        raise UserError(f"trainer.gradient_checkpointing: {type(backbone).__name__} has no blocks to checkpoint: set it to false") from None


def as_now(block: Callable[..., Any], *switches: Any) -> Callable[..., Any]:
    """A block that runs, at any later time, with the adapter, the casts and the end times that are in use now."""
    noted = [(switch, switch.active) for switch in switches if switch is not None]
    if not noted:
        return block

    def run(*inputs: Any, **named: Any) -> Any:
        with ExitStack() as stack:
            for switch, active in noted:
                stack.enter_context(switch.using(active))
            return block(*inputs, **named)

    return run


class Offload:
    """Weights of an idle network that wait on the CPU and are on the device only while it runs.

    They are frozen, or changed on the CPU alone (a target that follows the student), so nothing is ever copied back. A
    forward with gradients leaves a graph that needs them: they stay on the device until ``rest``, which the trainer
    calls after each update's backward pass.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self.device, self.tensors = device, list(tensors)
        self._awake, self._graph = True, False
        pinned = device.type == "cuda"
        self.homes = [t.detach().cpu().pin_memory() if pinned else t.detach().cpu() for t in self.tensors]
        self.rest()

    def wake(self) -> None:
        """To the device."""
        if not self._awake:
            for tensor, home in zip(self.tensors, self.homes, strict=True):
                tensor.data = home.to(self.device, non_blocking=True)
        self._awake = True

    def rest(self) -> None:
        """To the CPU. No graph through these tensors may be alive."""
        self._awake = self._graph = False
        for tensor, home in zip(self.tensors, self.homes, strict=True):
            tensor.data = home

    @contextmanager
    def using(self) -> Iterator[None]:
        """For one forward."""
        self._graph = self._graph or torch.is_grad_enabled()
        self.wake()
        try:
            yield
        finally:
            if not self._graph:
                self.rest()


def offload(network: BackboneDenoiser, busy: Iterable[Tensor], device: torch.device) -> Offload | None:
    """Let a network's weights wait on the CPU, but for those that busy networks share; None where nothing is its own.

    The first parameter stays: it tells diffusers, and ``Teacher.device``, where the network is.
    """
    shared = {id(t) for t in busy}
    own = [p for p in list(network.backbone.parameters())[1:] if id(p) not in shared]
    if not own:
        return None
    waiting, use = Offload(own, device), network.use

    def both() -> AbstractContextManager[None]:
        return _nested(waiting.using(), use())

    network.use = both
    return waiting


@contextmanager
def _nested(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield
