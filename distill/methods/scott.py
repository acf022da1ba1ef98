"""SCott, stochastic consistency distillation: the target is a few steps of an SDE away, and an adversary gives back what its mean loses.

    Liu, Xie et al. 2024, arXiv 2403.01505 (AAAI 2025)

    dx = [f x − ½(1 + eta²) g² score] dt + eta g dW    from t to s in three substeps;   L = Huber(f(x_t, t), sg f⁻(x_s, s)) + 0.4 L_adv

With a squared distance the fixed point on N(µ, s²) is µ + (s²/(s² + T²))^((1 + eta²)/2) (x − µ): the ODE's map at eta = 0, the posterior mean at
eta = 1, where one-step samples have no variety. The Huber distance, the coarse grid, a small eta and the adversary are what stands against it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.losses.metrics import Metric
from distill.mapping.solvers import Solver
from distill.matching.adversary import GAN
from distill.matching.times import UnitInterval
from distill.methods.consistency import Consistency


class SCott(Consistency):
    """Consistency distillation of the teacher's SDE, with an adversary."""

    name: Literal["scott"] = "scott"  # type: ignore[assignment]
    discretization: Annotated[tuple[int, int], Field()] = (40, 40)
    solver: Solver = "sde"
    eta: UnitInterval = 0.5  #: the paper's best is 1, with a strong adversary
    metric: Metric = "pseudo_huber_elementwise"
    gan: GAN | None = GAN(weight=0.4, features="teacher")
