"""Flow maps: one network for every jump X(x, t → s) along the probability-flow ODE; one engine for the methods that learn it.

With the average velocity U(x, t, s) of ``distill/flow.py`` (any schedule is a straight one there: z = x/(alpha + sigma), clock tau), u(x, t) the
velocity dz/dtau and h = tau_t − tau_s, the exact map fulfils

    tangent      U(x, t, t) = u(x, t)                                                                                          (diagonal)
    eulerian     U = u(x, t) − h (∂_tau U + u·∇U)(x, t, s)                        the start moves: a JVP in (x, t)
    lagrangian   U = u(X(x, t → s), s) + h ∂_{tau_s} U(x, t, s)                   the end moves: a derivative in s alone
    progressive  h U = (tau_t − tau_m) U(x, t, m) + (tau_m − tau_s) U(X(x, t → m), m, s)                                        (semigroup)
    teacher_step X(x, t → s) = X(x_m, m → s),  x_m by the teacher's solver from (x, t)

    Boffi, Albergo, Vanden-Eijnden 2025, "How to build a consistency model: learning flow maps via self-distillation", arXiv 2505.18825
    Geng, Deng, Bai, Kolter, He 2025, MeanFlow, arXiv 2505.13447       Frans et al. 2024, shortcut models, arXiv 2410.12557
    Kim, Lai et al. 2023, consistency trajectory models, arXiv 2310.02279

The right-hand side, without gradient, is what U is regressed on; on the diagonal it is u in all of them. u is the (guided) teacher's, or real
data's noise − x0, of which u is the mean: then no teacher is asked, and the student's law goes to the data's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser
from distill.flow import average_velocity, clock, jump, moved
from distill.guidance import Guided
from distill.jvp import Mode, directional_derivative
from distill.mapping.solvers import solver_step
from distill.matching.adversary import GAN, discriminator_loss, student_loss
from distill.matching.time_pairs import TimePairs
from distill.methods.base import Batch, Method, Update
from distill.roles import Roles
from distill.sampling import Sampler
from distill.schedule import double, expand_to

Scale = Annotated[float, Field(ge=0)]
Target = Literal["eulerian", "lagrangian", "progressive", "teacher_step"]


class FlowMap(Method):
    """Flow maps, distilled from a teacher or learnt from data."""

    name: Literal["flow_map"] = "flow_map"

    # sampling
    steps: Annotated[int, Field(ge=1, le=64)] = 4  #: network calls, if nothing is said
    most_steps: Annotated[int, Field(ge=1, le=64)] = 16  #: that can be asked for; a multiple of steps
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0  #: share of fresh noise at each step of a sample (CTM's); 0: the ODE

    # what is learnt
    target: Target = "lagrangian"
    #: u: the guided teacher's; "data": noise − x0 of real samples; "own": the same on the diagonal, and off it the student's own diagonal
    velocity: Literal["teacher", "data", "own"] = "teacher"
    guidance_scale: Scale = 1.0  #: w of u; without a teacher, of the student's own diagonal: u_null + w (noise − x0 − u_null)
    null: Annotated[float, Field(ge=0, lt=1)] = 0.1  #: share of samples that are told no condition, where that guidance needs it
    pairs: TimePairs = TimePairs()  #: how (t, s) are drawn, see matching/time_pairs.py
    network: Literal["stop_gradient", "ema"] = "stop_gradient"  #: whose answers the right-hand side is made of: the student's, or its average's
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999

    # eulerian and lagrangian
    derivative: Mode = "auto"  #: exact, finite_difference, or whichever works
    tangent_warmup: Annotated[float, Field(ge=0, le=1)] = 0.0  #: share of the training in which the derivative's term grows to its full weight
    tangent_limit: Annotated[float, Field(gt=0)] | None = None  #: the largest root mean square of a sample's h dU/dtau; larger ones are shortened
    # progressive
    middle: Literal["uniform", "half"] = "uniform"  #: where a jump is split, in t
    # teacher_step
    solver: Literal["ddim", "heun"] = "heun"
    solver_steps: Annotated[int, Field(ge=1)] = 4  #: on the way from t to m; their error is the student's
    reach: Annotated[float, Field(gt=0, le=1)] = 0.25  #: the longest t − m; m is uniform below it, and above s
    compare: Literal["end", "data"] = "end"  #: the two states at s, or what they become at s = 0 (CTM's soft consistency)

    # the loss
    #: p of e/(sg e + c)^p, e the mean square of a sample's error: 0 is L2, ½ near a norm. For a u without data's noise, or with it everywhere:
    #: beside jumps of small error the diagonal's noisy ones would hardly count
    power: Annotated[float, Field(ge=0, le=1)] = 0.0
    constant: Annotated[float, Field(gt=0)] = 1e-3  #: c
    #: scale the diagonal's part such that its gradient in U is as large as the jumps' (CTM's adaptive weight, there at the last layer)
    balance: bool = False
    gan: GAN | None = None  #: an adversary of the jumps to data, see matching/adversary.py

    @model_validator(mode="after")
    def _possible(self) -> FlowMap:
        if self.most_steps % self.steps:
            raise ValueError(f"most_steps ({self.most_steps}) must be a multiple of steps ({self.steps}): the steps are even parts of one grid")
        if self.pairs.high / self.steps > self.pairs.interval + 1e-9:
            raise ValueError(
                f"{self.steps} steps are jumps of {self.pairs.high / self.steps:g}, and pairs.interval trains none longer than {self.pairs.interval:g}: "
                "set more steps"
            )
        if self.target == "teacher_step" and self.pairs.backward:
            raise ValueError("pairs.backward: the teacher's solver only leads down: use another target")
        noisy = self.velocity == "own" or (self.velocity == "data" and self.target != "eulerian")
        if self.power and noisy and self.pairs.diagonal:
            why = f"velocity {self.velocity} with target {self.target} has noise on the diagonal alone, which such weights drown"
            raise ValueError(f"power: {why}: set power: 0")
        if self.compare == "data" and (self.target != "teacher_step" or self.network != "ema"):
            raise ValueError("compare: data is for target: teacher_step with network: ema, through which the gradient passes")
        if self.gan is not None and (self.gan.features == "critic" or self.gan.real != "data"):
            raise ValueError("gan: a flow map has no critic, and no longer samples: set gan.features to teacher, random or projected, and real to data")
        return self

    # -- what it needs ------------------------------------------------------------------------------------------------

    @property
    def roles(self) -> Sequence[str]:  # type: ignore[override]
        return ("student", "target") if self.network == "ema" else ("student",)

    def needs_images(self) -> bool:
        return True

    def end_time(self) -> bool:
        return True

    def discriminator_features(self) -> tuple[str, tuple[str, ...]] | None:
        return None if self.gan is None else (self.gan.features, tuple(self.gan.layers))

    def target_decay(self, progress: float) -> float:
        return self.ema_decay

    def sampler(self) -> Sampler:
        grid = tuple(self.pairs.high * (self.most_steps - i) / self.most_steps for i in range(self.most_steps))
        return Sampler(grid, self.steps, self.guidance_scale, gamma=self.gamma, end_time=True)

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        assert batch.x0 is not None
        schedule, told = roles.schedule, self._told(batch)
        t, s = self.pairs.draw(batch.x0, schedule, batch.progress)
        x_t = schedule.add_noise(batch.x0, batch.noise, t)
        first, network = self.pairs.on_diagonal(len(t)), roles.target or roles.student
        on, off = slice(first), slice(first, None)
        with torch.no_grad():
            wanted = self._velocity(roles, network, batch, x_t, t, told)
            if first < len(t):
                wanted = torch.cat([wanted[on], self._wanted(roles, network, wanted[off], x_t[off], t[off], s[off], told[off], batch.progress)])
        said = average_velocity(roles.student, x_t, t, s, told)
        errors = said - wanted.to(said)
        if self.compare == "data":
            errors = torch.cat([errors[on], self._at_data(roles, said[off], wanted[off], x_t[off], t[off], s[off], told[off])])
        each = errors.flatten(1).square().mean(1)
        each = each / (each.detach() + self.constant) ** self.power
        loss = self._balanced(each, said, first) if self.balance and said.requires_grad and 0 < first < len(t) else each.mean()
        logs = {name: errors[rows].detach().square().mean() for name, rows in (("diagonal", on), ("jumps", off)) if len(each[rows])}
        if self.gan is None:
            yield "student", loss, logs
            return
        zero = torch.zeros_like(t)
        made = jump(roles.student, x_t, t, zero, told)
        adversary = student_loss(self.gan, roles, made, told, batch.x0, batch.progress)
        yield "student", loss + self.gan.weight * adversary, logs | {"adversary": adversary.detach()}
        judged, accuracy = discriminator_loss(self.gan, roles, made.detach(), told, batch.x0, batch.progress)
        yield "discriminator", self.gan.discriminator_weight * judged, {"accuracy": accuracy}

    def _balanced(self, each: Tensor, said: Tensor, first: int) -> Tensor:
        """Mean of both parts, the diagonal's at most ten times as heavy as it is, and at least a hundredth."""
        diagonal, jumps = each[:first].sum() / len(each), each[first:].sum() / len(each)
        slopes = [torch.autograd.grad(part, said, retain_graph=True)[0].norm() for part in (diagonal, jumps)]
        return jumps + (slopes[1] / slopes[0].clamp_min(1e-12)).clamp(0.01, 10.0) * diagonal

    def _told(self, batch: Batch) -> Condition:
        if self.velocity == "teacher" or self.guidance_scale == 1 or batch.condition.null is None:
            return batch.condition
        return batch.condition.dropped(torch.rand(len(batch.noise), device=batch.noise.device) < self.null)

    def _velocity(self, roles: Roles, network: Denoiser, batch: Batch, x_t: Tensor, t: Tensor, told: Condition) -> Tensor:
        """u at x_t where it is wanted: of all samples, or of those on the diagonal, the first ones; (samples, ...)."""
        first = self.pairs.on_diagonal(len(t))
        some = slice(None) if self.target == "eulerian" else slice(first)
        x_t, t, told = x_t[some], t[some], told[some]
        if not len(t):
            return x_t
        if self.velocity == "teacher":
            return Guided(roles.teacher, self.guidance_scale).predict(x_t, t, told).as_kind("flow")
        assert batch.x0 is not None
        u = (batch.noise - batch.x0)[some]
        if self.guidance_scale != 1 and told.null is not None:
            free = average_velocity(network, x_t, t, t, told.unconditional())
            u = free + self.guidance_scale * (u - free)
        if self.velocity == "own":
            off = slice(first, None)
            u = torch.cat([u[:first], average_velocity(network, x_t[off], t[off], t[off], told[off]).to(u)]) if first < len(t) else u
        return u

    def _wanted(self, roles: Roles, network: Denoiser, u: Tensor, x_t: Tensor, t: Tensor, s: Tensor, told: Condition, progress: float) -> Tensor:
        """The right-hand side off the diagonal; (jumps, ...)."""
        if self.target == "eulerian":
            return self._eulerian(network, u, x_t, t, s, told, progress)
        if self.target == "lagrangian":
            return self._lagrangian(roles, network, x_t, t, s, told, progress)
        if self.target == "progressive":
            return self._progressive(network, x_t, t, s, told)
        return self._teacher_step(roles, network, x_t, t, s, told)

    def _eulerian(self, network: Denoiser, u: Tensor, x_t: Tensor, t: Tensor, s: Tensor, told: Condition, progress: float) -> Tensor:
        schedule = network.schedule
        (tau, _, slope), (tau_s, _, _) = clock(schedule, t), clock(schedule, s)
        tangent = schedule.convert(u, x_t, t, "flow", "velocity") / expand_to(slope, x_t)  # dx/dtau
        _, change = directional_derivative(network, x_t, t, told, v_x=tangent, v_t=1 / slope, s=s, kind="flow", mode=self.derivative)
        return u - self._tempered(expand_to(tau - tau_s, x_t) * change, progress)

    def _lagrangian(self, roles: Roles, network: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, told: Condition, progress: float) -> Tensor:
        schedule = network.schedule
        (tau, _, _), (tau_s, _, slope) = clock(schedule, t), clock(schedule, s)
        average, change = directional_derivative(network, x_t, t, told, s=s, v_s=1 / slope, kind="flow", mode=self.derivative)
        there, at = moved(schedule, x_t, t, s, average), s.clamp_min(schedule.t_min)
        if self.velocity == "teacher":
            u = Guided(roles.teacher, self.guidance_scale).predict(there, at, told).as_kind("flow")
        else:
            u = average_velocity(network, there, at, at, told)
        return u + self._tempered(expand_to(tau - tau_s, x_t) * change, progress)

    def _tempered(self, change: Tensor, progress: float) -> Tensor:
        """The derivative's term, warmed up and no longer than the limit."""
        change = change * (min(1.0, progress / self.tangent_warmup) if self.tangent_warmup else 1.0)
        if self.tangent_limit is not None:
            size = change.flatten(1).square().mean(1).sqrt()
            change = change * expand_to((self.tangent_limit / size.clamp_min(1e-12)).clamp_max(1), change)
        return change

    def _progressive(self, network: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, told: Condition) -> Tensor:
        share = torch.rand_like(t) if self.middle == "uniform" else torch.full_like(t, 0.5)
        m = s + (t - s) * share
        (tau, _, _), (tau_m, _, _), (tau_s, _, _) = (clock(network.schedule, time) for time in (t, m, s))
        # The shortest jumps are made of two steps of Euler's along the diagonal.
        finest = 2 * self.pairs.high / self.pairs.powers_of_two + 1e-9 if self.pairs.powers_of_two else 0.0
        ends = [torch.where((t - s).abs() <= finest, start, end) for start, end in halves(t, m, s)]
        one = average_velocity(network, x_t, t, ends[0], told)
        two = average_velocity(network, moved(network.schedule, x_t, t, m, one), m.clamp_min(network.schedule.t_min), ends[1], told)
        g = expand_to((tau - tau_m) / torch.where(tau == tau_s, 1.0, tau - tau_s), x_t)
        return g * double(one) + (1 - g) * double(two)

    def _teacher_step(self, roles: Roles, network: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, told: Condition) -> Tensor:
        schedule = network.schedule
        m = torch.maximum(s, t - self.reach * torch.rand_like(t))
        x, now = x_t, t
        for i in range(self.solver_steps):
            after = t + (m - t) * ((i + 1) / self.solver_steps)
            x, now = solver_step(Guided(roles.teacher, self.guidance_scale), x, now, after, told, self.solver), after
        x_s = jump(network, x, m.clamp_min(schedule.t_min), s, told)
        (tau, c, _), (tau_s, c_s, _) = clock(schedule, t), clock(schedule, s)
        way = double(x_t) / expand_to(c, x) - double(x_s) / expand_to(c_s, x)
        return way / expand_to(torch.where(tau == tau_s, 1.0, tau - tau_s), x)

    def _at_data(self, roles: Roles, said: Tensor, wanted: Tensor, x_t: Tensor, t: Tensor, s: Tensor, told: Condition) -> Tensor:
        """The difference of both states once a frozen network has carried them to data."""
        assert roles.target is not None
        network, schedule, at = roles.target, roles.schedule, s.clamp_min(roles.schedule.t_min)
        with frozen(network):
            ends = [jump(network, moved(schedule, x_t, t, s, u.to(said)), at, torch.zeros_like(s), told) for u in (said, wanted)]
        return ends[0] - ends[1].detach()


@contextmanager
def frozen(network: Denoiser) -> Iterator[None]:
    """Gradients pass through what it computes now, and not into it."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_()


def halves(t: Tensor, m: Tensor, s: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(start, end) of the two jumps that make up one."""
    return (t, m), (m, s)
