"""Distribution matching: one engine for every method that trains a generator by a difference of scores, or by an adversary.

A step in the papers' order:

    x = rollout of the student                                   (rollout; x at noise level s, 0 for most)
    t ~ score_times,  x_t = a x + b noise,  D_T = guided teacher, D_F = critic at x_t
    loss = score_weight · objective(x, x_t, D_T, D_F)  +  gan.weight · adversary  +  sum of terms          → student
    critic_steps times, on fresh samples: denoising score matching (+ the discriminator's loss)           → critic, discriminator

The methods of the literature are this with other settings: each has a file of its own beside this one that says which, with
its equation and source, and no code. Where implementations of one name differ silently, each variant is a setting here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction
from distill.guidance import Guided
from distill.losses.divergence import RatioNormalizer, find_weight, known_divergence
from distill.losses.metrics import batch_mean_abs
from distill.matching.adversary import GAN, discriminator_loss, judged, student_loss
from distill.matching.critic import Adaptive, CriticTarget, denoising_loss, published_tdm_loss
from distill.matching.objectives import LIVE, Objective, expanded_loss, injected, shaped, sid_loss, sim_loss
from distill.matching.refusals import refusals
from distill.matching.rollout import ODE, Rollout, Sample, roll_out
from distill.matching.terms import AnyTerm, Context
from distill.matching.times import Range, TimeLaw, Times, UnitInterval, draw_times, scope_of
from distill.methods.base import Batch, Method, PairsWanted, Update
from distill.roles import Roles
from distill.sampling import Sampler, uniform_ladder

Scale = Annotated[float, Field(ge=0)]
Weighting = Literal["dmd", "exact", "none", "eps"]


class PairSettings(BaseModel):
    """Samples of the teacher that are made before training, each with the noise that it came from."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    count: Annotated[int, Field(ge=1)] = 10_000
    steps: Annotated[int, Field(ge=1)] | None = None  #: of the teacher's own sampler; the recipe's teacher.steps if not given
    guidance_scale: Scale | None = None  #: what the student learns elsewhere, method.guidance_scale, if not given


class DistributionMatching(Method):
    """The engine with plain settings: reverse KL, one step, data-free."""

    name: Literal["distribution_matching"] = "distribution_matching"

    # the student
    steps: Annotated[int, Field(ge=1, le=8)] = 1  #: network calls of the student
    times: list[UnitInterval] | None = None  #: the student's ladder, descending; evenly spaced from 1 if not given
    rollout: Rollout = "backward_simulation"  #: which of its samples is judged, see matching/rollout.py
    own_ranges: bool = False  #: of trajectory: t lies below the time that the judged step came from, so that each step has a range of its own
    step_odds: list[Scale] | None = None  #: how often each step of the ladder is the one that is judged; equally often if not given
    gradient_steps: Annotated[int, Field(ge=1)] = 1  #: how many of a rollout's last calls carry gradient

    # the score difference
    objective: Objective = "kl"  #: what it is made into, see matching/objectives.py
    divergence: Annotated[str, AfterValidator(known_divergence)] = "reverse_kl"  #: of kl and expanded; or module:function of your own f(r)
    alpha: float | tuple[float, float] = 1.0  #: of sid; a pair moves linearly over training
    huber: Annotated[float, Field(gt=0)] | None = 0.01  #: c of sim's pseudo-Huber distance (root mean square); null: the squared norm
    live_ratio: bool = True  #: of expanded: h(r) is differentiated too, as the exact gradient wants
    score_weight: Scale = 1.0  #: of the objective in the student's loss
    #: "dmd" 1/mean|x − D_teacher| per sample; "exact" the divergence's own weight in alpha and sigma; "eps" alpha sigma (SwiftBrush:
    #: sigma² times the difference of noise predictions); "none" 1 (Diff-Instruct)
    weighting: Weighting = "dmd"
    snr_power: float = 0.0  #: multiplies the weight by (alpha²/sigma²) to this power
    score_times: TimeLaw = (0.02, 0.98)  #: t of the score difference, see matching/times.py
    guidance_scale: Scale | tuple[Scale, Scale] = 1.0  #: w of D_u + w (D_c − D_u) on the teacher; 1 is off; a range: drawn per sample (PG-SB)
    critic_guidance_scale: Scale | Literal["same"] = 1.0  #: of the critic in the score difference; "same": the teacher's (VSD)

    # the critic
    critic_steps: Annotated[int, Field(ge=1)] | Adaptive = 5  #: critic updates per student update, or by need: {lag: 0.5, at_most: 10}
    critic_times: TimeLaw = (0.001, 1.0)  #: t of denoising score matching
    critic_target: CriticTarget = "exact"  #: of samples at a noise level s > 0
    critic_null: UnitInterval = 0.0  #: share of its samples that it learns without their condition; a guided critic needs some
    critic_training_guidance: Scale | Literal["same"] = 1.0  #: of the critic in its own loss; "same": the teacher's (SiD-LSG)

    # the adversary, and anything else
    gan: GAN | None = None  #: the discriminator, see matching/adversary.py
    ratio_normalization: Literal["f_distill", "none"] = "f_distill"  #: of the weights h(r): the paper's two stages, or h(exp(logit)) as it is
    ratio_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5  #: of the density ratio's running means
    terms: list[AnyTerm] = []  #: auxiliary losses, see matching/terms.py
    real: Literal["data", "teacher"] = "data"  #: what counts as real samples in all of these: the data, or the teacher's own, made before training
    pairs: PairSettings = PairSettings()  #: how those, and the pairs of a regression, are made

    # -- what makes no sense ------------------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _possible(self) -> DistributionMatching:
        for reason in refusals(self):
            raise ValueError(reason)
        return self

    # -- what it needs ------------------------------------------------------------------------------------------------

    @property
    def has_critic(self) -> bool:
        return self.objective != "none"

    @property
    def needs_ratio(self) -> bool:
        """Whether weights h(r) are read from the discriminator. (Reverse KL's is 1.)"""
        return self.objective in ("kl", "expanded") and self.divergence != "reverse_kl"

    @property
    def roles(self) -> Sequence[str]:  # type: ignore[override]
        return ("student", "critic") if self.has_critic else ("student",)

    @property
    def looks_at_real(self) -> bool:
        scope = scope_of(self.score_times)
        own = (self.gan is not None and self.gan.real == "data") or (scope is not None and scope.against == "data")
        return own or self.rollout == "data" or any(term.needs_images for term in self.terms)

    def needs_images(self) -> bool:
        return self.real == "data" and self.looks_at_real

    def needs_pairs(self) -> PairsWanted | None:
        paired = any(term.needs_pairs for term in self.terms)
        if not paired and self.real == "data":
            return None
        own = self.pairs.guidance_scale
        return PairsWanted(self.pairs.count, self.pairs.steps, self._mean_guidance if own is None else own, paired)

    def needs_decoder(self) -> bool:
        return any(term.needs_decoder for term in self.terms)

    def discriminator_features(self) -> tuple[str, tuple[str, ...]] | None:
        return None if self.gan is None else (self.gan.features, tuple(self.gan.layers))

    def initial_state(self) -> dict[str, Tensor]:
        state = {"ratio_means": self._normalizer.initial_state()} if self.needs_ratio else {}
        state |= {"scope": torch.zeros(())} if scope_of(self.score_times) is not None else {}
        return state | ({"critic_need": self.critic_steps.initial_state()} if isinstance(self.critic_steps, Adaptive) else {})

    def sampler(self) -> Sampler:
        return Sampler(self._ladder, self.steps, self._mean_guidance, gamma=0.0 if self.rollout in ODE else 1.0)

    # -- the update rule ----------------------------------------------------------------------------------------------

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        batch = self._with_real(batch)
        # Student: the gradient of the divergence, the adversary's, and whatever else is wanted.
        sample = self._sample(roles, batch)
        loss, logs = self._student_loss(roles, batch, sample)
        yield "student", loss, logs

        # Critic and discriminator: follow the student on the faster time scale, on samples of the student as it is now
        # (those of before its update would lag by one: an overshoot of 0.317 in place of 0.288 in ``distill verify``).
        for _ in range(self._critic_updates(roles)):
            with torch.no_grad():
                sample = self._sample(roles, batch, fresh=True)
            yield from self._critic_update(roles, batch, sample)

    def _with_real(self, batch: Batch) -> Batch:
        """The batch with what counts as real samples in it."""
        made = batch.pairs
        if self.real == "data" or made is None:
            return batch
        return replace(batch, x0=made.x0, condition=made.condition, group=made.group, inputs=made.inputs)

    def _student_loss(self, roles: Roles, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss = sample.x0.new_zeros(())
        logs: dict[str, Tensor | float] = {}
        if self.objective != "none":
            term, logs = self._score_loss(roles, batch, sample)
            loss = self.score_weight * term
        if self.gan is not None and not self._is_longest(sample):
            adversarial = student_loss(self.gan, roles, sample.x0, batch.condition, self._real(roles, batch, sample), batch.progress)
            loss, logs["gan"] = loss + self.gan.weight * adversarial, adversarial.detach()
        for auxiliary in self.terms:
            weighted, logs[auxiliary.kind] = auxiliary.weighted(Context(roles, batch, sample, self._ladder[0]))
            loss = loss + weighted
        return loss, logs

    # -- the student --------------------------------------------------------------------------------------------------

    @property
    def _ladder(self) -> tuple[float, ...]:
        return tuple(self.times) if self.times is not None else uniform_ladder(self.steps)

    def _sample(self, roles: Roles, batch: Batch, fresh: bool = False) -> Sample:
        noise = torch.randn_like(batch.noise) if fresh else batch.noise
        return roll_out(roles.student, self.rollout, self._ladder, noise, batch.condition, batch.x0, self.gradient_steps, odds=self.step_odds)

    def _is_longest(self, sample: Sample) -> bool:
        """Whether no longer sample of the student exists that this one could be compared with."""
        return self.gan is not None and self.gan.real == "longer" and sample.steps == self.steps

    @torch.no_grad()
    def _real(self, roles: Roles, batch: Batch, sample: Sample) -> Tensor | None:
        assert self.gan is not None
        if self.gan.real == "data":
            return batch.x0
        noise = torch.randn_like(batch.noise)
        return roll_out(roles.student, self.rollout, self._ladder, noise, batch.condition, steps=sample.steps + 1).x0

    # -- the score difference -----------------------------------------------------------------------------------------

    def _score_loss(self, roles: Roles, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor | float]]:
        live = self.objective in LIVE
        x, x0, s = sample.x, sample.x0, sample.s
        t = self._draw(self.score_times, roles, batch, sample)
        noise = torch.randn_like(x)
        with nullcontext() if live else torch.no_grad():
            x_t = roles.schedule.renoise(x, noise, s, t)
            real, fake = self._predictions(roles, x_t, t, batch)
        with torch.no_grad():
            weight = self._weight(roles, x0, t, s, real, fake)
            logs: dict[str, Tensor | float] = {"score_gap": (weight * (fake.x0 - real.x0)).abs().mean()}
            if isinstance(self.critic_steps, Adaptive):
                logs["critic_lag"] = self.critic_steps.follow(roles.state["critic_need"], x0.detach(), real.x0, fake.x0)
                logs["critic_steps"] = roles.state["critic_need"][0].clone()
        if self.objective == "kl":
            h = shaped(self._h(roles, t, real, fake, batch.condition), x) if self.needs_ratio else 1.0
            return injected(x, (weight * h * (fake.x0 - real.x0)).detach()), logs
        if self.objective == "sid":
            return sid_loss(x, real.x0, fake.x0, weight, self._alpha(batch.progress)), logs
        if self.objective == "sim":
            return sim_loss(x, real.x0, fake.x0, weight, self.huber), logs
        with torch.no_grad():
            ratio = self._ratio(roles, t, real, fake, batch.condition) if self.needs_ratio else torch.ones(len(x), device=x.device)
        alpha, sigma = roles.schedule.coefficients(x, t)
        scale = (alpha / sigma**2).to(x)
        return expanded_loss(x, x_t, real.x0, fake.x0, weight, ratio, find_weight(self.divergence), scale, self.live_ratio), logs

    def _alpha(self, progress: float) -> float:
        start, end = self.alpha if isinstance(self.alpha, tuple) else (self.alpha, self.alpha)
        return start + (end - start) * progress

    def _draw(self, law: TimeLaw, roles: Roles, batch: Batch, sample: Sample) -> Tensor:
        below = self._below(law, roles, batch, sample) if isinstance(law, Times) and law.scope is not None else None
        if self.own_ranges:
            assert sample.start is not None
            below = sample.start if below is None else torch.minimum(below, sample.start)
        return draw_times(law, sample.x, roles.schedule, batch.progress, above=sample.s, below=below)

    @torch.no_grad()
    def _below(self, law: Times, roles: Roles, batch: Batch, sample: Sample) -> Tensor:
        """Each sample's own upper bound of t."""
        assert law.scope is not None
        interval, x, goal = law.interval(batch.progress), sample.x0, batch.x0
        if law.scope.against == "teacher":
            t = torch.full((len(x),), sum(interval) / 2, dtype=torch.float64, device=x.device)
            goal = roles.teacher(roles.schedule.add_noise(x, torch.randn_like(x), t), t, batch.condition.without_guidance())
        assert goal is not None
        return law.scope.below(interval, (x - goal).flatten(1).square().mean(1).sqrt(), roles.state["scope"])

    def _reference(self, roles: Roles, batch: Batch) -> tuple[Denoiser, Condition]:
        """Whom the student is compared with, and what that one is told: the teacher, the same as the student."""
        return roles.teacher, batch.condition

    def _predictions(self, roles: Roles, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Prediction, Prediction]:
        """The guided teacher's and the critic's predictions, with the features that the density ratio is read from."""
        assert roles.critic is not None
        (reference, asked), condition = self._reference(roles, batch), batch.condition
        on_backbone = self.needs_ratio and self.gan is not None and self.gan.on_backbone
        wanted = tuple(self.gan.layers) if on_backbone and self.gan is not None else ()
        of_teacher = wanted if self.gan is not None and self.gan.features == "teacher" else ()
        scale = self.guidance_scale
        if isinstance(scale, tuple):
            w = torch.rand(len(x_t), device=x_t.device) * (scale[1] - scale[0]) + scale[0]
            asked, condition, scale = asked.with_guidance(w), condition.with_guidance(w), 1.0
        own = scale if self.critic_guidance_scale == "same" else self.critic_guidance_scale
        told = condition if self.critic_guidance_scale == "same" else condition.without_guidance()
        teacher, critic = Guided(reference, scale), Guided(roles.critic, own)
        if roles.together is not None and not wanted and self.objective not in LIVE and reference is roles.teacher:
            both = roles.together.guided([(None, teacher, asked), ("critic", critic, told)], x_t, t)
            if both is not None:
                return both[0], both[1]
        return teacher.predict(x_t, t, asked, of_teacher), critic.predict(x_t, t, told, () if of_teacher else wanted)

    def _weight(self, roles: Roles, x0: Tensor, t: Tensor, s: Tensor | None, real: Prediction, fake: Prediction) -> Tensor:
        """w(t), shaped to multiply x; without h(r)."""
        alpha, sigma = roles.schedule.coefficients(x0, t)
        weight: Any = 1.0
        if self.weighting == "dmd":
            weight = 1 / batch_mean_abs(x0 - real.x0).clamp_min(1e-5)
        elif self.weighting == "eps":
            weight = alpha * sigma
        elif self.weighting == "exact":
            # kl: a (s_q − s_p) with a = alpha_t/alpha_s; the others: |s_p − s_q|²
            a = alpha if s is None else alpha / roles.schedule.coefficients(x0, s)[0]
            weight = a * alpha / sigma**2 if self.objective == "kl" else (alpha / sigma**2) ** 2
        if self.snr_power:
            weight = weight * (alpha / sigma) ** (2 * self.snr_power)
        return torch.as_tensor(weight, device=x0.device).to(x0).expand(len(x0), *[1] * (x0.dim() - 1))

    # -- the density ratio --------------------------------------------------------------------------------------------

    @property
    def _normalizer(self) -> RatioNormalizer:
        return RatioNormalizer(self._score_interval, decay=self.ratio_decay)

    @property
    def _score_interval(self) -> Range:
        return self.score_times if isinstance(self.score_times, tuple) else (self.score_times.low, self.score_times.high)

    def _logits(self, roles: Roles, t: Tensor, real: Prediction, fake: Prediction, condition: Condition) -> Tensor:
        """(batch,) mean over the heads at x_t."""
        assert roles.discriminator is not None and self.gan is not None
        features = real.features or fake.features
        logits = roles.discriminator(features) if features else judged(self.gan, roles, real.x_t, t, condition)
        return logits.reshape(len(t), -1).mean(1)

    def _ratio(self, roles: Roles, t: Tensor, real: Prediction, fake: Prediction, condition: Condition) -> Tensor:
        logits = self._logits(roles, t, real, fake, condition)
        return logits.double().exp() if self.ratio_normalization == "none" else self._normalizer.ratio(logits, t, roles.state["ratio_means"])

    def _h(self, roles: Roles, t: Tensor, real: Prediction, fake: Prediction, condition: Condition) -> Tensor:
        if self.ratio_normalization == "none":
            return find_weight(self.divergence)(self._ratio(roles, t, real, fake, condition))
        return self._normalizer.weight(self.divergence, self._logits(roles, t, real, fake, condition), t, roles.state["ratio_means"])

    # -- critic and discriminator -------------------------------------------------------------------------------------

    def _critic_updates(self, roles: Roles) -> int:
        if isinstance(self.critic_steps, Adaptive):
            return self.critic_steps.updates(roles.state["critic_need"])
        return self.critic_steps if self.has_critic or self.gan is not None else 0

    def _critic_update(self, roles: Roles, batch: Batch, sample: Sample) -> Iterator[Update]:
        loss = self._critic_loss(roles, batch, sample) if self.has_critic else None
        if self.gan is None or self._is_longest(sample):
            if loss is not None:
                yield "critic", loss, {}
            return
        if loss is not None and self.gan.features != "critic":
            yield "critic", loss, {}
            loss = None
        real = self._real(roles, batch, sample)
        assert real is not None
        adversarial, accuracy = discriminator_loss(self.gan, roles, sample.x0, batch.condition, real, batch.progress)
        if loss is None:
            yield "discriminator", adversarial, {"accuracy": accuracy}
        else:  # the critic's body learns from both losses
            logs = {"denoising": loss.detach(), "adversarial": adversarial.detach(), "accuracy": accuracy}
            yield ("critic", "discriminator"), loss + self.gan.discriminator_weight * adversarial, logs

    def _critic_loss(self, roles: Roles, batch: Batch, sample: Sample) -> Tensor:
        assert roles.critic is not None
        t, condition = self._draw(self.critic_times, roles, batch, sample), batch.condition
        if self.critic_null:
            condition = condition.dropped(torch.rand(len(t), device=t.device) < self.critic_null)
        if self.critic_target == "tdm_published" and sample.s is not None:
            return published_tdm_loss(roles.critic, sample.x, sample.x0, sample.s, t, condition)
        guidance = self._mean_guidance if self.critic_training_guidance == "same" else self.critic_training_guidance
        return denoising_loss(roles.critic, sample.x, t, condition, sample.s, guidance)

    @property
    def _mean_guidance(self) -> float:
        return sum(self.guidance_scale) / 2 if isinstance(self.guidance_scale, tuple) else self.guidance_scale
