"""Uni-Instruct's exact gradient of the expanded divergences against quadrature."""

from __future__ import annotations

from collections.abc import Iterator

from distill.losses.divergence import DIVERGENCES
from distill.matching.adversary import GAN
from distill.methods.sim import SIM
from distill.methods.uni_instruct import UniInstruct
from distill.verify.core import Check, at_most, between, relative_error
from distill.verify.quadrature import LEVELS, truth, yielded

BOUND = 3e-3


def exact(divergence: str, t: float, live_ratio: bool = True) -> UniInstruct:
    """Ratios as they are, the weight of the divergence itself; the GAN is there for its discriminator alone."""
    gan = GAN(weight=1e-30, features="teacher", layers=["state"])
    return UniInstruct(divergence=divergence, live_ratio=live_ratio, weighting="exact", score_times=(t, t), ratio_normalization="none", gan=gan)


def checks() -> Iterator[Check]:
    for name, (schedule, t) in LEVELS.items():
        for divergence in DIVERGENCES:
            if name != "CosineVP" and divergence not in ("forward_kl", "jensen_shannon"):
                continue
            wanted = truth(schedule, t, divergence)
            error = relative_error(yielded(exact(divergence, t), schedule), wanted)
            yield at_most("uni_instruct", f"{divergence}: the three parts' gradient against quadrature, {name}", error, BOUND)
            if divergence != "reverse_kl":
                dead = yielded(exact(divergence, t, live_ratio=False), schedule)
                yield at_most("uni_instruct", f"ablation: {divergence}, h(r) held still, {name}", relative_error(dead, wanted), BOUND, must_fail=True)
    schedule, t = LEVELS["CosineVP"]
    widths = [float(yielded(exact("forward_kl", t, live), schedule)[1]) for live in (True, False)]
    wanted = truth(schedule, t, "forward_kl")
    low, high = sorted((0.997 * float(wanted[1]), 1.003 * float(wanted[1])))
    yield between("uni_instruct", "forward_kl: slope in the student's width", widths[0], low, high)
    yield between("uni_instruct", "ablation: the same with h(r) held still", widths[1], low, high, must_fail=True)
    only = 2 * yielded(SIM(huber=None, weighting="exact", score_times=(t, t)), schedule)
    yield at_most("uni_instruct", "ablation: reverse_kl by SIM's part alone", relative_error(only, truth(schedule, t)), BOUND, must_fail=True)
    plain = yielded(exact("reverse_kl", t), schedule)
    yield at_most("uni_instruct", "ablation: no weight h(r), forward_kl", relative_error(plain, wanted), BOUND, must_fail=True)
