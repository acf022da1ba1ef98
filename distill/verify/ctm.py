"""CTM on a Gaussian: the exact map solves its loss, students reach it, and without denoising more steps are worse."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distill.analytic import ExactFlowMap, gaussian
from distill.denoiser import Condition
from distill.methods.base import Batch
from distill.methods.ctm import CTM
from distill.roles import Roles
from distill.verify.core import Check, at_most
from distill.verify.flow_map import DATA, PAIRS, SCHEDULES, map_errors, trained


def residual(schedule: str, wrong: bool = False) -> float:
    """The loss of the exact map without the diagonal's share, which real samples make noisy; both ends carried to data by it."""
    torch.manual_seed(0)
    teacher = gaussian(SCHEDULES[schedule], *DATA)
    exact = ExactFlowMap(teacher, gaussian(SCHEDULES[schedule], DATA[0], (0.7, 0.9)) if wrong else None)
    method = CTM(pairs=PAIRS.model_copy(update={"diagonal": 0.0}), solver_steps=32)
    batch = Batch(torch.randn(1000, 2, dtype=torch.float64), Condition(), teacher.sample(1000).double())
    return float(next(iter(method.step(Roles(teacher, exact, target=exact), batch)))[1].detach())


def checks() -> Iterator[Check]:
    for name in SCHEDULES:
        yield at_most("ctm", f"{name}: residual of the exact map, 32 solver steps", residual(name), 1e-5)
        yield at_most("ctm", f"ablation: {name}: of another Gaussian's", residual(name, True), 1e-5, must_fail=True)
    errors = map_errors(*trained(CTM(pairs=PAIRS), SCHEDULES["flow"], 1000), (1, 4, 16))
    for steps, error in zip((1, 4, 16), errors, strict=True):
        yield at_most("ctm", f"flow: error of the trained map, {steps} steps", error, 0.05)
    blind = CTM(pairs=PAIRS.model_copy(update={"diagonal": 0.0}))
    four, many = map_errors(*trained(blind, SCHEDULES["flow"], 1000), (4, 16))
    yield at_most("ctm", "flow: error in 16 steps over that in 4", errors[2] / errors[1], 1.0)
    yield at_most("ctm", "ablation: no denoising: the same", many / four, 1.0, must_fail=True)
