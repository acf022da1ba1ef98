"""Which modes of an unbalanced mixture a distilled student keeps, by method: exact teacher, equal cost, several seeds.

    python tools/bench_diversity.py --jobs 2 --out runs/diversity --markdown runs/diversity/table.md --figure docs/diversity.png

The teacher is the exact denoiser of eight Gaussians in two dimensions, their weights from 0.02 to 0.30; student and critic are small
networks. All methods have the same start, learning rates, batch and number of student updates; methods of several steps have fewer
critic updates, so that an update costs about as many forward passes (counted, in the table). A run that is finished is skipped when
the tool is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.analytic import GaussianMixture, MLPDenoiser
from distill.denoiser import Condition
from distill.evaluate.frechet import density_coverage, precision_recall
from distill.losses.adversarial import Discriminator
from distill.methods import available
from distill.methods.base import Batch, Method
from distill.roles import Roles
from distill.sampling import renoise_sample
from distill.schedule import CosineVP
from distill.verify.core import starting_at, train
from distill.verify.dmd2 import mode_masses

WEIGHTS = (0.30, 0.02, 0.14, 0.05, 0.20, 0.03, 0.16, 0.10)  #: of the modes, counterclockwise from the right
RADIUS, STD = 2.0, 0.2
UPDATES, BATCH, WIDTH, SAMPLES = 1500, 256, 64, 2000
RATES = {"student": 2e-3, "critic": 4e-3, "discriminator": 2e-3}

GAN = {"weight": 0.1, "features": "teacher", "layers": ["state"]}
RATIO_ONLY = GAN | {"weight": 1e-30}  #: the discriminator gives the density ratio and nothing else
COMMON = {"score_times": (0.02, 0.98), "critic_times": (0.01, 0.99)}
#: name → settings of its method. A method that is not there is left out: the list may be ahead of the package.
METHODS: dict[str, dict[str, Any]] = {
    "DMD2: reverse KL": {"name": "dmd2", "critic_steps": 4},
    "DMD2: reverse KL, GAN": {"name": "dmd2", "critic_steps": 4, "gan": GAN},
    "f-distill: Jensen–Shannon": {"name": "f_distill", "critic_steps": 4, "gan": RATIO_ONLY},
    "f-distill: forward KL": {"name": "f_distill", "divergence": "forward_kl", "critic_steps": 4, "gan": RATIO_ONLY},
    "f-distill: Jensen–Shannon, GAN": {"name": "f_distill", "critic_steps": 4, "gan": GAN},
    "f-distill: forward KL, GAN": {"name": "f_distill", "divergence": "forward_kl", "critic_steps": 4, "gan": GAN},
    "EL: reverse KL, embedding loss": {"name": "el", "critic_steps": 4, "terms": [{"kind": "embedding", "weight": 10.0}]},
    "DMD2, 4 steps": {"name": "dmd2", "steps": 4, "critic_steps": 2},
    "TDM, 2 steps": {"name": "tdm", "steps": 2, "critic_steps": 3, "own_ranges": True},
    "TDM, 4 steps": {"name": "tdm", "steps": 4, "critic_steps": 2, "own_ranges": True},
    "Phased DMD, 4 steps": {"name": "phased_dmd", "steps": 4, "critic_steps": 2},
}


def mixture() -> GaussianMixture:
    """The teacher."""
    angle = torch.arange(len(WEIGHTS)) * (2 * math.pi / len(WEIGHTS))
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(CosineVP(), means, torch.full((len(WEIGHTS), 1), STD), torch.tensor(WEIGHTS))


# -- one run ------------------------------------------------------------------------------------------------------------


def run(name: str, seed: int, result: Path) -> None:
    """Train and measure one method, and write its numbers; nothing to do where they are there."""
    if result.is_file():
        return
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    teacher, before, passes = mixture(), time.process_time(), Counter[str]()
    made = teacher.sample(SAMPLES) if name == REFERENCE else trained(METHODS[name], teacher, passes)
    numbers = measured(teacher, made) | {f"passes/{role}": n / UPDATES / BATCH for role, n in passes.items()}
    numbers["cpu_seconds"] = time.process_time() - before
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(numbers | {"samples": [[round(v, 2) for v in x] for x in made.tolist()]}) + "\n", encoding="utf-8")


REFERENCE = "the mixture itself"


def trained(settings: dict[str, Any], teacher: GaussianMixture, passes: Counter[str]) -> Tensor:
    """(SAMPLES, 2) samples of a student after UPDATES updates; forward passes of samples are counted by role."""
    method: Method = available()[settings["name"]].model_validate(COMMON | settings)
    student, critic = (MLPDenoiser(teacher.schedule, 2, WIDTH, data_std=1.4) for _ in range(2))
    starting_at(student, START, SPREAD)
    discriminator = Discriminator({"state": (3,)}, hidden=WIDTH) if method.discriminator_features() else None
    roles = Roles(teacher, student, critic, discriminator=discriminator, state=method.initial_state())
    for role, network in {"teacher": teacher, "student": student, "critic": critic}.items():
        network.predict = counting(network.predict, role, passes)  # type: ignore[method-assign]
    rates = {role: rate for role, rate in RATES.items() if role != "discriminator" or discriminator is not None}

    def draw(step: int) -> Batch:
        return Batch(torch.randn(BATCH, 2), Condition(), teacher.sample(BATCH))

    averaged = train(method, roles, draw, UPDATES, rates, betas=(0.0, 0.99), average=0.99)
    with torch.no_grad():
        for p, value in zip(student.parameters(), averaged, strict=True):
            p.copy_(value)
        sampler = method.sampler()
        return renoise_sample(student, sampler.ladder(), torch.randn(SAMPLES, 2), None, gamma=sampler.gamma)


def counting(call: Callable[..., Any], role: str, passes: Counter[str]) -> Callable[..., Any]:
    def counted(x_t: Tensor, *rest: Any, **more: Any) -> Any:
        passes[role] += len(x_t)
        return call(x_t, *rest, **more)

    return counted


def measured(teacher: GaussianMixture, made: Tensor) -> dict[str, float]:
    """Modes covered, distance of their shares to the weights, and the metrics of ``distill eval`` against as many real samples."""
    real = teacher.sample(len(made))
    near = torch.cdist(made.double(), teacher.means).min(1).values < 4 * STD
    shares, weights = mode_masses(teacher, made), torch.tensor(WEIGHTS)
    kept = mode_masses(teacher, made[near]) * near.double().mean()
    (precision, recall), (density, coverage) = precision_recall(real, made), density_coverage(real, made)
    return {
        "modes": float((kept >= KEPT * weights).sum()), "tv": float(0.5 * (shares - weights).abs().sum()), "outside": float(1 - near.double().mean()),
        "precision": precision, "recall": recall, "density": density, "coverage": coverage,
    } | {f"share/{i}": float(s) for i, s in enumerate(shares)}  # fmt: skip


KEPT = 0.25  #: a mode counts as covered with this share of its weight, within four of its standard deviations
START, SPREAD = torch.tensor([0.7, 0.0]), 0.5
