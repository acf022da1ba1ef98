"""Consistency: one engine for every method that learns the solution map of the (teacher's, or the data's) probability-flow ODE.

    x_t, t    noised data, or a point of the teacher's own trajectory                     (trajectories)
    x_s, s    a step further along: the teacher's (DDIM, Heun, SDE), or on the line of x0 and noise       (solver, gap, discretization)
    L = w d( f(x_t, t → e), sg f⁻(x_s, s → e) ),      f(x, t → e) = DDIM(x, D(x, t); t → e),   f(x, e → e) = x
        + gan.weight · adversary + terms + matching_weight · score difference                           → student
    then the discriminator's and the critic's updates

e is the data (t = 0), or the lower edge of t's segment. The boundary is a hard switch on the target's side, exact for any weights.
With ``tangent`` the pair is one point and the difference a derivative: the limit s → t.

The methods of the literature are this with other settings; each has a file of its own beside this one that says which. As it is:

    CD   Song, Dhariwal, Chen, Sutskever 2023, arXiv 2303.01469          LCM  Luo et al. 2023, arXiv 2310.04378, 2311.05556
    CT   the same with ``solver: data``: x_s = alpha_s x0 + sigma_s noise with the x0 and the noise of x_t, an unbiased estimate of the
         step that the exact score would take: the student's law goes to the data's and not to the teacher's
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction
from distill.guidance import Guided
from distill.losses.metrics import METRICS, Metric
from distill.mapping.extras import Made, extra_loss, followers
from distill.mapping.pairs import End, Gap, Pair, Weighting, gap_weights, interval_weights, intervals, noise_ratio, segment_count, segment_end, snapped, time_of
from distill.mapping.points import Points, Trajectories, noised, travelled
from distill.mapping.proxy import ProxyReward
from distill.mapping.refusals import refusals
from distill.mapping.solvers import Solver, jump, sde_step, solver_step, straight_step
from distill.mapping.tangent import Tangent, angle, field, leveled, normalized, straight_field, tangent
from distill.mapping.truncation import Truncation
from distill.matching.adversary import GAN
from distill.matching.terms import AnyTerm
from distill.matching.times import TimeLaw, UnitInterval, draw_times
from distill.methods.base import Batch, Method, Update
from distill.methods.distribution import DistributionMatching
from distill.roles import Roles
from distill.sampling import Sampler, uniform_ladder
from distill.schedule import NoiseSchedule, expand_to


class Consistency(Method):
    """The engine with plain settings: consistency distillation (CD, LCM)."""

    name: Literal["consistency"] = "consistency"

    # the student
    steps: Annotated[int, Field(ge=1, le=8)] = 4  #: the most network calls that it is sampled with
    times: list[UnitInterval] | None = None  #: its ladder, descending; evenly spaced from 1 if not given
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  #: w of the teacher's ODE; 1 is off
    guidance_range: tuple[float, float] | None = None  #: w ~ U[low, high] per sample, told to the student (LCM)
    guidance_embedding_width: Annotated[int, Field(ge=2)] = 256

    # the pair
    trajectories: Trajectories | None = None  #: learn at the teacher's own states, without images; noised data if not given
    discretization: Annotated[tuple[int, int], Field()] = (50, 50)  #: grid intervals N at the start and at the end
    gap: Gap | None = None  #: no grid, but a gap that shrinks (ECT)
    train_times: TimeLaw = (0.0, 1.0)  #: law of t; on the grid each interval has the mass that lies in it
    solver: Solver = "ddim"  #: of the step from t to s; data: none, x_s on the line between x0 and noise
    eta: UnitInterval = 1.0  #: noise of the solver sde: 0 is the ODE, 1 the ancestral step
    substeps: Annotated[int, Field(ge=1)] = 3  #: of the solver sde, for one interval
    segments: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1]  #: of [0, 1], one number per equal span of training
    end: End = "edge"  #: the lower edge of t's segment, or random: anywhere between it and s (TSCD)
    gamma: UnitInterval | None = None  #: share of fresh noise between the steps of a sample; 1, or 0 with segments, if not given
    truncation: Truncation | None = None  #: a second stage above a noise level (TCM)
    tangent: Tangent | None = None  #: the limit s → t (sCM), with these settings

    # the comparison
    metric: Metric = "pseudo_huber"
    target: Literal["ema", "stop_gradient"] = "ema"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95  #: of the target
    weighting: Weighting = "uniform"

    # what goes with it
    gan: GAN | None = None  #: an adversary, see mapping/extras.py and matching/adversary.py
    gan_at_start: UnitInterval = 0.0  #: share of what it judges that the student makes of pure noise (SANA-Sprint)
    proxy: ProxyReward | None = None  #: a reward through a stand-in that is learnt online (RG-LCD), see mapping/proxy.py
    terms: list[AnyTerm] = []  #: auxiliary losses, see matching/terms.py
    matching: DistributionMatching | None = None  #: a difference of scores on the student's own samples (rCM, Hyper-SD); steps and times are these
    matching_weight: Annotated[float, Field(gt=0)] = 1.0
    matching_from: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: part of the training after which it sets in

    @model_validator(mode="after")
    def _possible(self) -> Consistency:
        for reason in refusals(self):
            raise ValueError(reason)
        return self

    # -- what it needs ------------------------------------------------------------------------------------------------

    @property
    def roles(self) -> Sequence[str]:  # type: ignore[override]
        kept = self.target == "ema" or self.truncation is not None
        return ("student", *(["critic"] if self.matching is not None else []), *(["target"] if kept else []))

    def needs_images(self) -> bool:
        judged = self.gan is not None and self.gan.real == "data"
        return self.trajectories is None or judged or any(term.needs_images for term in self.terms)

    def needs_decoder(self) -> bool:
        return self.proxy is not None or any(term.needs_decoder for term in self.terms)

    def discriminator_features(self) -> tuple[str, tuple[str, ...]] | None:
        if self.proxy is not None:
            return "teacher", tuple(self.proxy.layers)
        return None if self.gan is None else (self.gan.features, tuple(self.gan.layers))

    def guidance_embedding(self) -> int:
        return self.guidance_embedding_width if self.guidance_range is not None else 0

    def target_decay(self, progress: float) -> float:
        if self.truncation is not None:  # the student's own weights, and those of the first stage's end from then on
            return float(progress >= self.truncation.start)
        return self.ema_decay

    def initial_state(self) -> dict[str, Tensor]:
        state = {} if self.matching is None else self.matching.initial_state()
        if self.tangent is not None and self.tangent.adaptive:
            state |= {"tangent_means": torch.zeros(self.tangent.bins)}
        return state

    @property
    def ladder(self) -> tuple[float, ...]:
        return tuple(self.times) if self.times is not None else uniform_ladder(self.steps)

    def sampler(self) -> Sampler:
        gamma = self.gamma if self.gamma is not None else float(self.segments[-1] == 1)
        return Sampler(self.ladder, self.steps, self.guidance_scale, self.guidance_range, gamma)

    def score_matching(self, progress: float) -> DistributionMatching | None:
        """The difference of scores that is wanted now, on this student's ladder."""
        if self.matching is None or progress < self.matching_from:
            return None
        return self.matching.model_copy(update={"steps": self.steps, "times": list(self.ladder)})

    def intervals(self, progress: float) -> int:
        return intervals(self.discretization, progress)

    def segment_count(self, progress: float) -> int:
        return segment_count(self.segments, progress)

    # -- the update rule ----------------------------------------------------------------------------------------------

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        points = self._points(roles, batch)
        learn = self._pair_loss if self.tangent is None else self._tangent_loss
        loss, made, logs = learn(roles, batch, points)
        extra, others = extra_loss(self, roles, batch, made)
        yield "student", loss + extra, logs | others
        yield from followers(self, roles, batch, made.detached())

    def _points(self, roles: Roles, batch: Batch) -> Points:
        """The states that are learnt at."""
        told = self._told(batch)
        if self.trajectories is not None:
            teacher = Guided(roles.teacher, self.guidance_scale)
            return travelled(teacher, self.trajectories, batch.noise, told, lambda t: self._on_grid(t, batch.progress))
        assert batch.x0 is not None
        return noised(roles.schedule, batch.x0, batch.noise, self._draw(roles, batch), told)

    def _told(self, batch: Batch) -> Condition:
        """The condition with a random guidance scale per sample, where the student is told it."""
        if self.guidance_range is None:
            return batch.condition
        low, high = self.guidance_range
        return batch.condition.with_guidance(low + (high - low) * torch.rand(len(batch.noise), device=batch.noise.device))

    def _on_grid(self, t: Tensor, progress: float) -> Tensor:
        """t as it is, or where the grid has its next time."""
        return t if self.gap is not None or self.tangent is not None else snapped(t, self.intervals(progress))

    def _draw(self, roles: Roles, batch: Batch) -> Tensor:
        """t of noised data."""
        cut = self._cut(batch.progress)
        above = None if cut is None else torch.full((len(batch.noise),), cut.level, dtype=torch.float64, device=batch.noise.device)
        t = draw_times(self.train_times, batch.noise, roles.schedule, batch.progress, above=above).clamp_min(roles.schedule.t_min)
        if cut is not None:
            t = cut.moved(t, 1e-6)
        return self._on_grid(t, batch.progress)

    def _cut(self, progress: float) -> Truncation | None:
        """The second stage, once it has begun."""
        return self.truncation if self.truncation is not None and progress >= self.truncation.start else None

    # -- with a step between the two points -----------------------------------------------------------------------------

    def _pair(self, schedule: NoiseSchedule, t: Tensor, progress: float) -> Pair:
        if self.gap is not None:
            above = noise_ratio(schedule, t)
            below = self.gap.below(above, progress)
            weight = gap_weights(self.weighting, above, below)
            return Pair(t, time_of(schedule, below), torch.zeros_like(t), weight / weight.mean())
        n = self.intervals(progress)
        i = (t * n).round().long() - 1
        s = i.double() / n
        end = torch.zeros_like(t) if not self.phased else segment_end(t, s, self.segment_count(progress), self.end)
        return Pair(t, s, end, interval_weights(self.weighting, schedule, n, t.device)[i])

    def _pair_loss(self, roles: Roles, batch: Batch, points: Points) -> tuple[Tensor, Made, dict[str, Tensor | float]]:
        pair, condition = self._pair(roles.schedule, points.t, batch.progress), points.condition
        end = pair.end if self.phased else None
        with torch.no_grad():
            x_s = self._further(roles, points, pair.s)
            target = self._target(roles, x_s, pair.s, condition, end, batch.progress)
        x0 = roles.student(points.x_t, pair.t, condition)
        x = x0 if end is None else jump(roles.schedule, points.x_t, x0, pair.t, end)
        distance = METRICS[self.metric](x, target)
        weighted, cut = pair.weight.to(distance) * distance, self._cut(batch.progress)
        loss = weighted.mean() if cut is None else cut.combined(weighted)
        return loss, Made(x, x0, condition, end, target, _real(batch, points)), {"gap": (pair.t - pair.s).mean()}

    def _further(self, roles: Roles, points: Points, s: Tensor) -> Tensor:
        """x_s, one step further along."""
        if self.solver == "data":
            assert points.x0 is not None and points.noise is not None
            return straight_step(roles.schedule, points.x0, points.noise, s)
        teacher = Guided(roles.teacher, self.guidance_scale)
        if self.solver == "sde":
            return sde_step(teacher, points.x_t, points.t, s, points.condition, self.eta, self.substeps, points.said)
        return solver_step(teacher, points.x_t, points.t, s, points.condition, self.solver, points.said)

    def _target(self, roles: Roles, x_s: Tensor, s: Tensor, condition: Condition, end: Tensor | None, progress: float) -> Tensor:
        """f⁻(x_s, s → e)."""
        cut = self._cut(progress)
        if self.target == "ema" or cut is not None:
            assert roles.target is not None
            kept = consistency_function(roles.target, x_s, s, condition, end)
            if cut is None:
                return kept
        own = consistency_function(roles.student, x_s, s, condition, end)
        return own if cut is None else torch.where(expand_to(s <= cut.level + 1e-6, own), kept, own)

    @property
    def phased(self) -> bool:
        """Whether jumps end anywhere but at the data."""
        return self.segments != [1] or self.end == "random"

    # -- with none ----------------------------------------------------------------------------------------------------

    def _tangent_loss(self, roles: Roles, batch: Batch, points: Points) -> tuple[Tensor, Made, dict[str, Tensor | float]]:
        assert self.tangent is not None
        settings, schedule, x_t, t, condition = self.tangent, roles.schedule, points.x_t, points.t, points.condition
        sd = settings.data_std
        with torch.no_grad():
            if self.solver == "data":
                assert points.x0 is not None and points.noise is not None
                truth = straight_field(schedule, points.x0, points.noise, t, sd)
            elif points.said is not None:
                truth = field(Prediction(points.said, "x0", x_t, t, schedule), sd)
            else:
                truth = field(Guided(roles.teacher, self.guidance_scale).predict(x_t, t, condition), sd)
            value, g = tangent(roles.student, truth, x_t, t, condition, settings.strength(batch.progress), settings)
            wanted = value + normalized(g, settings.c)
        prediction = roles.student.predict(x_t, t, condition)
        loss = (field(prediction, sd) - wanted).square().flatten(1).mean(1)
        logs: dict[str, Tensor | float] = {"tangent": g.flatten(1).norm(dim=1).mean() / g[0].numel() ** 0.5}
        if settings.adaptive:
            loss = leveled(loss, angle(schedule, t, sd), roles.state["tangent_means"], settings.memory)
        x0 = prediction.x0
        return loss.mean(), Made(x0, x0, condition, real=_real(batch, points)), logs


def _real(batch: Batch, points: Points) -> Tensor | None:
    """The batch's real samples, one for each point."""
    if batch.x0 is None or len(batch.x0) == len(points.x_t):
        return batch.x0
    return batch.x0.repeat(len(points.x_t) // len(batch.x0), *[1] * (batch.x0.dim() - 1))


def consistency_function(network: Denoiser, x: Tensor, t: Tensor, condition: Condition | None, end: Tensor | None = None) -> Tensor:
    """f(x, t → e): the x0-prediction, taken to ``end`` by DDIM if one is given, and x itself at e (the boundary condition, exact)."""
    x0 = network(x, t.clamp_min(network.schedule.t_min), condition)
    return jump(network.schedule, x, x0, t, torch.zeros_like(t) if end is None else end)
