"""Diff-Instruct against closed forms."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distill.analytic import AffineGenerator
from distill.matching.times import draw_times
from distill.methods.diff_instruct import LOG_SIGMA, DiffInstruct
from distill.schedule import EDM
from distill.verify.core import Check, at_most, between, relative_error
from distill.verify.dmd2 import STUDENT, close_modes, divergence_value
from distill.verify.quadrature import LEVELS, gradient_of, yielded
from distill.verify.vsd import settled


def checks() -> Iterator[Check]:
    for name, (schedule, t) in LEVELS.items():
        alpha, sigma = (float(c) for c in schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
        generator, time = AffineGenerator(schedule, *STUDENT), torch.tensor([t], dtype=torch.float64)
        kl = gradient_of(divergence_value("reverse_kl", close_modes(schedule), generator.law(), time, torch.ones(1)), generator)
        plain = yielded(DiffInstruct(score_times=(t, t)), schedule)
        yield at_most("diff_instruct", f"weight 1: sigma²/alpha² times KL's gradient, {name}", relative_error(plain, (sigma / alpha) ** 2 * kl), 1e-3)
        exact = yielded(DiffInstruct(score_times=(t, t), weighting="exact"), schedule)
        yield at_most("diff_instruct", f"the exact weight: KL's gradient, {name}", relative_error(exact, kl), 1e-3)
        halved = relative_error(plain, 0.5 * (sigma / alpha) ** 2 * kl)
        yield at_most("diff_instruct", f"ablation: another weight, {name}", halved, 1e-3, must_fail=True)
    torch.manual_seed(0)
    schedule = EDM()
    level = -0.5 * schedule.log_snr(draw_times(LOG_SIGMA, torch.empty(20_000), schedule))
    yield between("diff_instruct", "mean of log(sigma/alpha)", float(level.mean()), -1.21, -1.19)
    yield between("diff_instruct", "its standard deviation", float(level.std()), 1.19, 1.21)
    uniform = -0.5 * schedule.log_snr(draw_times((0.001, 0.98), torch.empty(20_000), schedule))
    yield between("diff_instruct", "ablation: uniform times, its standard deviation", float(uniform.std()), 1.19, 1.21, must_fail=True)
    yield at_most("diff_instruct", "width of a student of N(0, 1), off by", abs(settled(DiffInstruct()) - 1), 1e-3)
    yield at_most("diff_instruct", "ablation: no critic (SDS), off by", abs(settled(DiffInstruct(), sds=True) - 1), 1e-3, must_fail=True)
