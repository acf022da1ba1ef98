"""TDM, trajectory distribution matching: every point of a deterministic few-step trajectory has the teacher's law at its noise level.

    Luo, Hu, Sun, Cai, Tang 2025 (ICCV), arXiv 2503.06674

    x_{t_1} = noise,   x_{t_{i+1}} = DDIM step from x_{t_i} along G(x_{t_i}, t_i),       i drawn
    tau > t_{i+1},     x_tau = a x_{t_{i+1}} + b noise:        g = (D_F − D_T)(x_tau, tau) / mean|x0 − D_T|

Unlike DMD2's several steps no noise is drawn between the calls, and what is judged is where the step has arrived, not the clean
sample that it points to: the latter has not the data's law, nor need it have. The critic therefore has no clean samples to learn from;
the target that serves is that of samples at a noise level (``critic_target: exact``). The published one regresses x0 itself, whose
error is not independent of x_tau: its fixed point is another.

With ``own_ranges`` tau lies in (t_{i+1}, t_i], for the critic too (the published code's "use_separate"): tau says which step a
sample is from, so that one critic keeps the steps apart. Without them it learns the mean over the steps that lie below tau.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.matching.critic import Adaptive
from distill.matching.rollout import Rollout
from distill.methods.distribution import DistributionMatching


class TDM(DistributionMatching):
    """Reverse KL at every point of a deterministic trajectory."""

    name: Literal["tdm"] = "tdm"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 4
    rollout: Rollout = "trajectory"
    critic_steps: Annotated[int, Field(ge=1)] | Adaptive = 1
