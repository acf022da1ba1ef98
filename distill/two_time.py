"""Students that are told two times: where a jump starts, t, and where it ends, s.

Any backbone of diffusers becomes one: ``pipelines/end_time.py`` adds an embedding of t − s to the backbone's own embedding of the time, whose
module is found by trying it out: its answer depends on the time, and on nothing else. The new embedding's last layer starts at zero,
so that the student is the teacher for every s. It is a network of its own beside the backbone (or its adapter): trained, averaged,
checkpointed under ``end_time.…`` and exported as a further component of the few-step pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import BackboneDenoiser, Condition
from distill.errors import UserError
from distill.loading import shipped_model
from distill.teacher import Teacher

NAME = "end_time"  #: of its parameters, and of the component of an exported pipeline


def end_time_embedding(teacher: Teacher, network: BackboneDenoiser) -> Any:
    """A fresh one for a network that starts from the teacher (or is its own), on its device; in float32.

    Raises:
        UserError: if the backbone has no embedding of the time alone.
    """
    found = time_modules(teacher, network)
    made = shipped_model("EndTime")(list(found), list(found.values())).eval()
    return made.to(teacher.device)


@torch.no_grad()
def time_modules(teacher: Teacher, network: BackboneDenoiser) -> dict[str, int]:
    """The network's embeddings of the time, by name, and the widths of their answers: the outermost modules with weights whose answer, a
    row per sample, changes with the time, and not with the sample or the condition. Of those that hang on one another the first.

    Raises:
        UserError: if there is none.
    """
    backbone = network.backbone
    if any(p.is_meta for p in backbone.parameters()):  # a plan's networks have no values; the usual class says enough of sizes
        found = {n: m.linear_2.out_features for n, m in backbone.named_modules() if type(m).__name__ == "TimestepEmbedding"}
        return dict(list(found.items())[:1]) if len(found) < 8 else found
    draw = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, *teacher.sample_shape, generator=draw).to(teacher.device) for _ in range(2))
    early, late = (torch.full((2,), t, dtype=torch.float64, device=teacher.device) for t in (0.3, 0.6))
    told = teacher.condition([teacher.placeholder()] * 2)
    answers = _answers(network, x, early, told)
    later, elsewhere = _answers(network, x, late, told), _answers(network, other, early, told)
    otherwise = _answers(network, x, early, told.unconditional()) if told.null is not None else answers

    def fits(name: str) -> bool:
        value = answers[name]
        same = all(torch.equal(value, a[name]) for a in (elsewhere, otherwise) if name in a and a[name].shape == value.shape)
        return same and later[name].shape == value.shape and not torch.equal(value, later[name])

    fitting = [name for name in answers if fits(name)]
    outermost = [n for n in fitting if not any(n.startswith(f"{o}.") for o in fitting)]
    chosen: dict[str, int] = {}
    while outermost:  # in the order in which they answer
        first, *others = outermost
        chosen[first] = answers[first].shape[-1]
        moved = _answers(network, x, early, told, first)
        outermost = [name for name in others if name in moved and torch.equal(moved[name], answers[name])]
    if not chosen:
        raise UserError(f"{type(backbone).__name__} has no embedding of the time alone, so its student cannot be told where a jump ends: use another method")
    return chosen


def _answers(network: BackboneDenoiser, x: Tensor, t: Tensor, told: Condition, moved: str | None = None) -> dict[str, Tensor]:
    """What each module with weights answers in one forward, if that is a tensor of whole rows per sample; in the order in which they end.

    Args:
        moved: a module whose answer is changed.
    """
    caught: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, Tensor) and output.dim() >= 2 and output.is_floating_point() and name not in caught:
                caught[name] = output.clone()
            return output + 1 if name == moved else None

        return hook

    modules = [(n, m) for n, m in network.backbone.named_modules() if n and next(m.parameters(), None) is not None]
    handles = [m.register_forward_hook(hook_for(n)) for n, m in modules]
    try:
        network.predict(x, t, told)
    finally:
        for handle in handles:
            handle.remove()
    return caught
