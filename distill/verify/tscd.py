"""TSCD: what its jumps end at, and what the segments that merge are for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.analytic import GaussianMixture, MLPDenoiser, ring
from distill.denoiser import Condition
from distill.mapping.pairs import segment_count, segment_end
from distill.mapping.solvers import jump
from distill.methods.base import Batch
from distill.methods.tscd import TSCD
from distill.roles import Roles
from distill.sampling import renoise_sample
from distill.schedule import CosineVP, Flow
from distill.verify.core import Check, at_most, between, train


def checks() -> Iterator[Check]:
    yield from end_checks()
    yield from merging_checks()


def end_checks() -> Iterator[Check]:
    """e lies in t's segment and not above s; a jump from s to s is x itself, and to 0 the x0-prediction, bit by bit."""
    torch.manual_seed(0)
    t = torch.arange(1, 65, dtype=torch.float64).repeat(50) / 64
    s = t - 1 / 64
    for count in (8, 1):
        edge, end = segment_end(t, s, count, "edge"), segment_end(t, s, count, "random")
        outside = ((end < edge - 1e-12) | (end > s + 1e-12) | (edge < t - 1 / count - 1e-12)).sum()
        yield at_most("tscd", f"ends outside of [edge, s], {count} segments", float(outside), 0)
    wide = segment_end(t, s, 8, "random") - segment_end(t, s, 8, "edge")
    yield between("tscd", "mean of (e − edge)/(s − edge)", float((wide / (s - segment_end(t, s, 8, "edge")).clamp_min(1e-9))[s * 8 % 1 > 0].mean()), 0.47, 0.53)
    x, x0, level = torch.randn(4, 2), torch.randn(4, 2), torch.full((4,), 0.4, dtype=torch.float64)
    for schedule in (CosineVP(), Flow()):
        stay, land = jump(schedule, x, x0, level, level), jump(schedule, x, x0, level, 0 * level)
        error = float((stay - x).abs().max() + (land - x0).abs().max())
        yield at_most("tscd", f"jumps of no length and to the data, {type(schedule).__name__}: error", error, 0.0)
    seen = [segment_count([8, 4, 2, 1], p) for p in (0.0, 0.24, 0.26, 0.6, 0.99)]
    yield at_most("tscd", "segments over training, against 8, 8, 4, 2, 1", float(seen != [8, 8, 4, 2, 1]), 0)


def sampled(method: TSCD, teacher: GaussianMixture, steps: int, calls: int, batch: int = 256) -> Tensor:
    """Samples of a trained student, in so many calls."""
    torch.manual_seed(0)
    student, target = (MLPDenoiser(teacher.schedule, 2, width=64, data_std=1.4) for _ in range(2))
    target.load_state_dict(student.state_dict())
    roles = Roles(teacher, student, target=target if method.target == "ema" else None)
    kept = train(method, roles, lambda step: Batch(torch.randn(batch, 2), Condition(), teacher.sample(batch)), steps, {"student": 4e-3}, average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), kept, strict=True):
            assert isinstance(p, nn.Parameter)
            p.copy_(value)
        noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
        return renoise_sample(student, method.sampler().ladder(calls), noise, None, gamma=method.sampler().gamma)


def bridging(x: Tensor, teacher: GaussianMixture, far: float = 3.0) -> float:
    """Share of samples more than three deviations from every mode; for a Gaussian of two dimensions exp(−9/2) = 0.011."""
    apart = torch.cdist(x.double(), teacher.means) / teacher.stds[0, 0]
    return float((apart.min(1).values > far).double().mean())


SMALL = {"discretization": (16, 16), "target": "stop_gradient", "solver": "heun"}  #: settings that converge in seconds


def merging_checks() -> Iterator[Check]:
    """The way from noise to data in one step, learnt from eight short ones: with the same budget, less mass falls between the modes."""
    teacher = ring(CosineVP(), modes=4, radius=1.5, std=0.3)
    merged, alone = (bridging(sampled(TSCD.model_validate({"segments": s, **SMALL}), teacher, 1200, 1), teacher) for s in ([8, 4, 2, 1], [1]))
    yield at_most("tscd", "four modes: share of one-step samples between them", merged, 0.25)
    yield at_most("tscd", "ablation: one segment from the start, the same budget", alone, 0.25, must_fail=True)
