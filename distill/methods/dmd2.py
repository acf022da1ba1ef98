"""DMD2 and f-distill: match the student's noised distribution to the teacher's, in one or a few steps.

    DMD2       Yin et al. 2024, arXiv 2405.14867      f-distill  Xu, Nie, Vahdat 2025, arXiv 2502.15681

The student's sample x receives the gradient of an f-divergence between the noised laws of student and teacher,

    g = w(t) h(r) (D_critic − D_teacher)(x_t, t),          x_t = alpha x + sigma noise,

with h = 1 for reverse KL (DMD2) and h(r) = r² f''(r) in general, r the density ratio that the discriminator estimates.
The critic learns the student's own denoiser by denoising score matching, several updates per student update (two time
scales); a GAN term on hidden features compares noised student samples with noised real ones. Multi-step students are
trained on their own intermediate samples (backward simulation).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, Denoiser, Prediction, cat
from distill.guidance import Guided
from distill.losses.adversarial import discriminator_loss, generator_loss
from distill.losses.divergence import Divergence, RatioNormalizer, divergence_weight
from distill.losses.metrics import batch_mean_abs
from distill.methods.base import Batch, Method, Update, uniform_times
from distill.roles import Roles
from distill.sampling import Sampler, uniform_ladder
from distill.together import Question

UnitInterval = Annotated[float, Field(ge=0, le=1)]
Weighting = Literal["dmd", "kl"]


class GAN(BaseModel):
    """The adversarial term."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight: Annotated[float, Field(gt=0)] = 3e-3  #: of softplus(−logit) in the student's loss
    discriminator_weight: Annotated[float, Field(gt=0)] = 1e-2  #: of the logistic loss in the critic's, on its own features
    features: Literal["critic", "teacher"] = "critic"  #: whose hidden features are judged
    layers: Annotated[list[str], Field(min_length=1)] = ["mid_block"]  #: module names inside the backbone
    times: tuple[UnitInterval, UnitInterval] = (0.0, 1.0)  #: range of the noise level of its inputs
    r1: Annotated[float, Field(ge=0)] = 0.0  #: approximate R1: mean square change of real logits under noise of std 0.1


class DMD2(Method):
    """Distribution matching distillation (DMD2), with a choice of divergence (f-distill)."""

    name: Literal["dmd2"] = "dmd2"
    roles: ClassVar[Sequence[str]] = ("student", "critic")

    steps: Annotated[int, Field(ge=1, le=8)] = 1  #: network calls of the student
    times: list[UnitInterval] | None = None  #: the student's ladder, descending; evenly spaced from 1 if not given
    divergence: Divergence = "reverse_kl"
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0  #: w of D_u + w (D_c − D_u) on the teacher; 1 is off
    critic_steps: Annotated[int, Field(ge=1)] = 5  #: critic updates per student update
    score_weight: Annotated[float, Field(ge=0)] = 1.0  #: of the distribution-matching term
    weighting: Weighting = "dmd"  #: w(t): "dmd" 1/mean|x − D_teacher| per sample, "kl" alpha²/sigma², the exact KL
    score_times: tuple[UnitInterval, UnitInterval] = (0.02, 0.98)  #: t of the distribution-matching term
    critic_times: tuple[UnitInterval, UnitInterval] = (0.001, 1.0)  #: t of denoising score matching
    gan: GAN | None = None
    ratio_normalization: Literal["f_distill", "none"] = "f_distill"  #: of the weights h(r): the paper's two stages, or h(exp(logit)) as it is
    ratio_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5  #: of the density ratio's running means (f-distill)

    @model_validator(mode="after")
    def _possible(self) -> DMD2:
        if self.divergence != "reverse_kl" and self.gan is None:
            raise ValueError(f"divergence {self.divergence} needs a density ratio: add a gan section, or use reverse_kl")
        if self.times is not None and (len(self.times) != self.steps or sorted(self.times, reverse=True) != self.times):
            raise ValueError(f"times must be {self.steps} descending numbers, one per step")
        return self

    def needs_images(self) -> bool:
        return self.gan is not None

    def discriminator_features(self) -> tuple[str, tuple[str, ...]] | None:
        return None if self.gan is None else (self.gan.features, tuple(self.gan.layers))

    def initial_state(self) -> dict[str, Tensor]:
        return {"ratio_means": self._normalizer.initial_state()} if self.divergence != "reverse_kl" else {}

    def sampler(self) -> Sampler:
        return Sampler(self._ladder, self.steps, self.guidance_scale)

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        assert roles.critic is not None
        # Student: the gradient of the divergence, injected into its samples.
        x = self._generate(roles, batch)
        t = uniform_times(x, *self.score_times)
        x_t = roles.schedule.add_noise(x.detach(), torch.randn_like(x), t)
        with torch.no_grad():
            real, fake = self._scores(roles, x_t, t, batch.condition)
            weight = self._weight(roles, x.detach(), t, real, fake)
            g = weight * (fake.x0 - real.x0)
            logs = {"score_gap": g.abs().mean()}
        loss = self.score_weight * injected(x, g)
        if self.gan is not None:
            level = uniform_times(x, *self.gan.times)
            adversarial = generator_loss(self._logits(roles, x, batch.condition, level, torch.randn_like(x)))
            loss = loss + self.gan.weight * adversarial
            logs["gan"] = adversarial.detach()
        yield "student", loss, logs

        # Critic and discriminator: follow the student on the faster time scale, on samples of the student as it is now
        # (those of before its update would lag by one: an overshoot of 0.317 in place of 0.288 in ``distill verify``).
        for _ in range(self.critic_steps):
            with torch.no_grad():
                x = self._generate(roles, batch, fresh=True)
            yield from self._critic_update(roles, batch, x)

    # -- the student --------------------------------------------------------------------------------------------------

    @property
    def _ladder(self) -> tuple[float, ...]:
        return tuple(self.times) if self.times is not None else uniform_ladder(self.steps)

    def _generate(self, roles: Roles, batch: Batch, fresh: bool = False) -> Tensor:
        """A student sample after a random number of its steps, with gradient through the last one (backward simulation:
        DMD2 sec. 4.5). The earlier steps run as they will at inference, so that training sees the same inputs."""
        noise = torch.randn_like(batch.noise) if fresh else batch.noise
        ladder = self._ladder
        last = int(torch.randint(len(ladder), ())) if len(ladder) > 1 else 0

        def at(time: float) -> Tensor:
            return torch.full((len(noise),), time, dtype=torch.float64, device=noise.device)

        x_t = noise * roles.schedule.initial_scale
        with torch.no_grad():
            for time, following in zip(ladder[:last], ladder[1:], strict=False):
                x0 = roles.student(x_t, at(time), batch.condition)
                x_t = roles.schedule.add_noise(x0, torch.randn_like(x0), at(following))
        return roles.student(x_t, at(ladder[last]), batch.condition)

    def _scores(self, roles: Roles, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Prediction]:
        """The guided teacher's and the critic's predictions, with the features that the density ratio is read from."""
        assert roles.critic is not None
        wanted = () if self.divergence == "reverse_kl" or self.gan is None else tuple(self.gan.layers)
        of_teacher = wanted if self.gan is not None and self.gan.features == "teacher" else ()
        guided = Guided(roles.teacher, self.guidance_scale)
        asked = guided.asked(x_t, t, condition) if roles.together is not None and not wanted else None
        if asked is not None and asked[2] is not None:
            assert roles.together is not None
            both = roles.together.ask([Question(None, *asked), Question("critic", x_t, t, condition)])  # type: ignore[arg-type]
            if both is not None:
                return guided.answered(both[0], x_t, t, condition), both[1]
        real = guided.predict(x_t, t, condition, of_teacher)
        fake = roles.critic.predict(x_t, t, condition, () if of_teacher else wanted)
        return real, fake

    def _weight(self, roles: Roles, x: Tensor, t: Tensor, real: Prediction, fake: Prediction) -> Tensor:
        """w(t) h(r), shaped to multiply x."""
        if self.weighting == "kl":
            alpha, sigma = roles.schedule.coefficients(x, t)
            weight = ((alpha / sigma) ** 2).to(x)
        else:
            weight = 1 / batch_mean_abs(x - real.x0).clamp_min(1e-5)
        if self.divergence == "reverse_kl":
            return weight
        assert roles.discriminator is not None
        logits = roles.discriminator(real.features or fake.features)
        logits = logits.reshape(len(x), -1).mean(1)
        if self.ratio_normalization == "none":
            h = divergence_weight(self.divergence, logits.double().exp())
        else:
            h = self._normalizer.weight(self.divergence, logits, t, roles.state["ratio_means"])
        return weight * h.to(x).reshape((-1,) + (1,) * (x.dim() - 1))

    @property
    def _normalizer(self) -> RatioNormalizer:
        return RatioNormalizer(self.score_times, decay=self.ratio_decay)

    # -- critic and discriminator -------------------------------------------------------------------------------------

    def _critic_update(self, roles: Roles, batch: Batch, x: Tensor) -> Iterator[Update]:
        assert roles.critic is not None
        t = uniform_times(x, *self.critic_times)
        loss = denoising_loss(roles.critic, x, t, batch.condition)
        if self.gan is None:
            yield "critic", loss, {}
        elif self.gan.features == "critic":  # the critic's body learns from both losses
            adversarial, accuracy = self._adversarial(roles, batch, x)
            logs = {"denoising": loss.detach(), "adversarial": adversarial.detach(), "accuracy": accuracy}
            yield ("critic", "discriminator"), loss + self.gan.discriminator_weight * adversarial, logs
        else:
            yield "critic", loss, {}
            adversarial, accuracy = self._adversarial(roles, batch, x)
            yield "discriminator", adversarial, {"accuracy": accuracy}

    def _adversarial(self, roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's logistic loss on student samples against real ones, both noised, with approximate R1 (the
        logits' change under a small nudge of the real samples, at the same noise); and its accuracy."""
        assert self.gan is not None and batch.x0 is not None
        t, noise = uniform_times(x, *self.gan.times), torch.randn_like(x)
        clean, told = [x, batch.x0], [batch.condition] * 2
        if self.gan.r1:
            clean, told = [*clean, batch.x0 + 0.1 * torch.randn_like(x)], [*told, batch.condition]
        n = len(clean)
        logits = self._logits(roles, torch.cat(clean), cat(told), t.repeat(n), noise.repeat(n, *[1] * (x.dim() - 1)))
        fake, real = logits[: len(x)], logits[len(x) : 2 * len(x)]
        loss = discriminator_loss(real, fake)
        accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        if self.gan.r1:
            loss = loss + self.gan.r1 * (logits[2 * len(x) :] - real).square().mean()
        return loss, accuracy

    def _logits(self, roles: Roles, x: Tensor, condition: Condition, t: Tensor, noise: Tensor) -> Tensor:
        """Logits of clean samples noised to t; differentiable in x and in the network whose features are judged."""
        assert self.gan is not None and roles.discriminator is not None
        network = roles.critic if self.gan.features == "critic" else roles.teacher
        assert network is not None
        x_t = roles.schedule.add_noise(x, noise, t)
        return roles.discriminator(network.features(x_t, t, condition, tuple(self.gan.layers)))


def injected(x: Tensor, g: Tensor) -> Tensor:
    """A loss whose gradient in x is g / numel: ½ mean ‖x − sg[x − g]‖². (The mean is over every element: all losses of
    the toolkit reduce so, and their weights compare.)"""
    return 0.5 * (x - (x - g).detach()).square().mean()


def denoising_loss(network: Denoiser, x0: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """Denoising score matching on x0 in the network's own parameterisation, mean over elements; never guided."""
    x_t = network.schedule.add_noise(x0, torch.randn_like(x0), t)
    target = network.schedule.convert(x0, x_t, t, "x0", network.kind).to(x0)
    return (network.predict(x_t, t, condition).value.to(x0) - target).square().mean()
