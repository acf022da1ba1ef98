"""Two mixtures in the plane whose denoisers are known exactly, and the small networks that are trained on them: what the benchmarks
of many runs use. As in a distillation proper, student and critic start as a network that has learnt the teacher's denoiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bench_runs import count_passes
from torch import Tensor, nn

from distill.analytic import GaussianMixture, MLPDenoiser, ring
from distill.denoiser import Condition
from distill.losses.adversarial import Discriminator
from distill.losses.divergence import RatioNormalizer
from distill.matching.adversary import GAN
from distill.matching.critic import denoising_loss
from distill.methods.base import Batch, strata
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import descend, replaced, train
from distill.verify.dmd2 import mode_masses, ring_scores

BATCH, WIDTH, PRETRAINING = 256, 64, 1000
RATES = {"student": 2e-3, "critic": 4e-3, "discriminator": 4e-3}  #: of Adam, falling to zero
#: A discriminator's features here are (x_t, t) themselves: small networks have no layers by name.
ADVERSARY = GAN(layers=["state"])


def unbalanced(schedule: Any) -> GaussianMixture:
    """Six Gaussians off the middle, the widest 2.5 times the narrowest, the heaviest (0.32) 8 times the lightest (0.04)."""
    means = torch.tensor([[-2.2, 0.6], [-0.6, 2.0], [1.6, 1.8], [2.4, -0.6], [0.4, -0.4], [-1.2, -2.0]])
    stds = torch.tensor([0.3, 0.2, 0.4, 0.25, 0.5, 0.3])[:, None]
    return GaussianMixture(schedule, means, stds, torch.tensor([0.32, 0.04, 0.24, 0.08, 0.20, 0.12]))


MIXTURES: dict[str, Callable[[Any], GaussianMixture]] = {"ring": lambda schedule: ring(schedule, std=0.3), "unbalanced": unbalanced}


@dataclass(frozen=True)
class Toy:
    """A teacher, and the network that has learnt its denoiser."""

    teacher: GaussianMixture
    network: MLPDenoiser


def make_toy(mixture: str) -> Toy:
    """The same at every call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schedule = CosineVP()
    teacher = MIXTURES[mixture](schedule)
    network = MLPDenoiser(schedule, 2, WIDTH, data_std=1.4)

    def loss() -> Tensor:
        return denoising_loss(network, teacher.sample(2 * BATCH), strata(torch.empty(2 * BATCH)), None)

    descend(network.parameters(), loss, PRETRAINING, 3e-3)
    return Toy(teacher, network)


# -- many trainings at once ---------------------------------------------------------------------------------------------


class Linears(nn.Module):
    """As many linear layers as there are runs: row r of the input is run r mod runs's."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([m.weight.detach().T for m in layers]))
        self.bias = nn.Parameter(torch.stack([m.bias.detach()[None] for m in layers]))

    def forward(self, x: Tensor) -> Tensor:
        apart = x.reshape(-1, len(self.weight), x.shape[-1]).transpose(0, 1)
        return torch.baddbmm(self.bias, apart, self.weight).transpose(0, 1).reshape(len(x), -1)


class Norms(nn.Module):
    """The same of layer norms."""

    def __init__(self, layers: Sequence[nn.LayerNorm]) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.stack([getattr(m, k).detach() for m in layers])) for k in ("weight", "bias"))

    def forward(self, x: Tensor) -> Tensor:
        apart = nn.functional.layer_norm(x, x.shape[-1:]).reshape(-1, *self.weight.shape)
        return (apart * self.weight + self.bias).reshape(x.shape)


def together(networks: Sequence[Any]) -> Any:
    """One network that is all of these, each on rows of its own."""
    made = copy.deepcopy(networks[0])
    for name, module in networks[0].named_modules():
        kind = Linears if isinstance(module, nn.Linear) else Norms if isinstance(module, nn.LayerNorm) else None
        if kind is not None:
            owner, _, last = name.rpartition(".")
            setattr(made.get_submodule(owner), last, kind([n.get_submodule(name) for n in networks]))  # type: ignore[arg-type]
    return made


@contextmanager
def ratios_apart(runs: int) -> Iterator[None]:
    """f-distill's means over a batch are those of each run: with them no run knows of the others."""
    of_all = RatioNormalizer.weight

    def weight(self: RatioNormalizer, divergence: str, logits: Tensor, t: Tensor, bin_means: Tensor) -> Tensor:
        return torch.stack([of_all(self, divergence, logits[i::runs], t[i::runs], bin_means[i]) for i in range(runs)], 1).flatten()

    with replaced(RatioNormalizer, "weight", weight):
        yield


def train_toy(
    toy: Toy, method: DistributionMatching, seeds: Sequence[int], steps: int | None = None, factor: float = 1.0, passes: int | None = None,
    average: float = 0.99, batch: int = BATCH,
) -> tuple[list[Tensor], dict[str, Any]]:
    """(4,000 samples of each seed's student, what one of them took). The seeds are trained side by side, in one network of many: most of
    the time of networks as small as these is spent between the operations.

    Args:
        steps: of the student; or else passes: so many forward passes of a batch, student, critic and teacher together.
        factor: of all learning rates; average: decay of the student's average, 0: its last weights.
    """
    assert (steps is None) != (passes is None)
    runs = len(seeds)
    torch.manual_seed(1000 + seeds[0])
    student, critic = together([toy.network] * runs), together([toy.network] * runs)
    discriminator = together([Discriminator({"state": (3,)}, hidden=WIDTH) for _ in seeds]) if method.gan is not None else None
    state = {k: v.expand(runs, -1).clone() if k == "ratio_means" else v for k, v in method.initial_state().items()}
    roles = Roles(copy.copy(toy.teacher), student, critic, discriminator=discriminator, state=state)
    rates = {role: RATES[role] * factor for role in roles.trained()}
    counted = count_passes(roles)
    student_steps = 0

    def draw(step: int) -> Batch:
        nonlocal student_steps
        student_steps += 1
        return Batch(torch.randn(batch * runs, 2), Condition(), toy.teacher.sample(batch * runs))

    def done() -> float:
        return student_steps / steps if steps is not None else sum(counted.values()) / (batch * runs * (passes or 1))

    with ratios_apart(runs):
        averaged = train(method, roles, draw, steps or passes or 0, rates, betas=(0.0, 0.99), average=average, done=done)
    spent = {"steps": student_steps, "passes": {k: v // runs for k, v in counted.items()}}
    with torch.no_grad():
        for p, value in zip(student.parameters(), averaged, strict=True):
            p.copy_(value)
    return samples(student, runs), spent


@torch.no_grad()
def samples(student: MLPDenoiser, runs: int = 1) -> list[Tensor]:
    """(4,000, 2) of each run in one step."""
    x = student(torch.randn(4000 * runs, 2), torch.tensor(1.0, dtype=torch.float64))
    return [x[i::runs] for i in range(runs)]


def scores(teacher: GaussianMixture, x: Tensor) -> dict[str, Any]:
    """Distance: sliced 1-Wasserstein, over that of two sets of the teacher's. Coverage: the mass that the modes have in common with the
    teacher's, sum of min(share, weight). Spread: total variance over the teacher's, its root."""
    if not bool(x.isfinite().all()):
        return {"finite": False, "distance": None, "coverage": 0.0, "spread": 0.0}
    torch.manual_seed(0)  # the same sets of the teacher's for everybody
    distance = ring_scores(teacher, x)[1]
    coverage = float(torch.minimum(mode_masses(teacher, x).double(), teacher.log_weights.exp()).sum())
    spread = math.sqrt(float(x.var(0).sum()) / float(teacher.sample(20_000).var(0).sum()))
    return {"finite": True, "distance": distance, "coverage": coverage, "spread": spread}
