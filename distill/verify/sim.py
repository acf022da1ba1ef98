"""SIM against closed forms."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distill.matching.objectives import sim_loss
from distill.methods.sid import SiD
from distill.methods.sim import SIM
from distill.verify.core import Check, at_most, relative_error
from distill.verify.quadrature import LEVELS, truth, yielded
from distill.verify.sid import with_still_inputs

BOUND = 2e-3


def exact(huber: float | None, t: float) -> SIM:
    return SIM(huber=huber, weighting="exact", score_times=(t, t))


def checks() -> Iterator[Check]:
    for name, (schedule, t) in LEVELS.items():
        for c in (None, 1.0, 0.1):
            wanted = truth(schedule, t, frozen=True, c=c)
            what = "the squared norm" if c is None else f"pseudo-Huber, c = {c:g}"
            yield at_most("sim", f"{what}: gradient with the law frozen, {name}", relative_error(2 * yielded(exact(c, t), schedule), wanted), BOUND)
        yield at_most("sim", f"ablation: another c, {name}", relative_error(2 * yielded(exact(1.0, t), schedule), wanted), BOUND, must_fail=True)
        still = 2 * with_still_inputs(exact(0.1, t), schedule)
        yield at_most("sim", f"ablation: no gradient through x_t, {name}", relative_error(still, wanted), BOUND, must_fail=True)
    schedule, t = LEVELS["CosineVP"]
    plain = yielded(SiD(alpha=1.0, weighting="exact", score_times=(t, t)), schedule)
    for c, fails in ((1e3, False), (1.0, True)):
        name = f"{'ablation: ' if fails else ''}c = {c:g}: c times its gradient against SiD's, alpha 1"
        yield at_most("sim", name, relative_error(c * yielded(exact(c, t), schedule), plain), 1e-4, must_fail=fails)
    yield from size_checks()


def size_checks() -> Iterator[Check]:
    """c → 0: the loss does not depend on how far the scores are apart, sample by sample, and d' is the direction of the whole
    sample's difference, so that its elements keep their proportions."""
    torch.manual_seed(0)
    x, fake, gap = (torch.randn(6, 3, 4, dtype=torch.float64) for _ in range(3))
    scale = torch.logspace(-2, 2, 6, dtype=torch.float64).reshape(6, 1, 1)

    def slope(gap: torch.Tensor, c: float | None) -> torch.Tensor:
        """Gradient in x of the loss: minus d' over the number of elements."""
        live = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(sim_loss(live, fake + gap, fake, torch.ones(6, 1, 1, dtype=torch.float64), c), live)
        return g

    for c, fails in ((1e-9, False), (None, True)):
        change = relative_error(slope(scale * gap, c), slope(gap, c))
        name = "ablation: the squared norm" if fails else "c → 0"
        yield at_most("sim", f"{name}: change of d' with the distance of the scores", change, 1e-6, must_fail=fails)
    whole = gap / gap.flatten(1).square().mean(1).sqrt().reshape(6, 1, 1)
    yield at_most("sim", "c → 0: d' against the unit vector of the whole sample", relative_error(-slope(gap, 1e-9) * gap.numel(), whole), 1e-6)
    yield at_most("sim", "ablation: against the sign of each element", relative_error(-slope(gap, 1e-9) * gap.numel(), gap.sign()), 1e-6, must_fail=True)
