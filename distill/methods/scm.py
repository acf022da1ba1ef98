"""sCM, consistency in continuous time: no step between the two points, one derivative in its place.

    Lu & Song 2024, arXiv 2410.11081 (ICLR 2025)

    L = E ‖F_θ − sg[F + g/(‖g‖ + c)]‖²/exp(l(phi)),     g = −cos² phi (F − dx/dphi) − r cos phi sin phi (x + dF/dphi)

in TrigFlow's coordinates, to which any teacher is taken by algebra (mapping/tangent.py): no grid, and no error of one. dx/dphi is the
teacher's (sCD), or that of real data with ``solver: data`` (sCT). log sigma/alpha ~ N(−1, 1.4²).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.mapping.tangent import Tangent
from distill.matching.times import TimeLaw, Times
from distill.methods.consistency import Consistency


class SCM(Consistency):
    """Continuous-time consistency distillation."""

    name: Literal["scm"] = "scm"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 2
    tangent: Tangent | None = Tangent()
    train_times: TimeLaw = Times(law="log_sigma", mean=-1.0, std=1.4)
    target: Literal["ema", "stop_gradient"] = "stop_gradient"
