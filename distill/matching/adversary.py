"""The adversarial term: a discriminator on features of noised samples (DMD2, sec. 4.3; LADD: Sauer et al. 2024).

With the logistic loss the optimal logit is log p_data/q at (x_t, t, condition): a density ratio, which the f-divergence weights
need. Hinge and relativistic logits have no such reading.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.denoiser import Condition, cat
from distill.imports import import_object
from distill.losses.adversarial import ADVERSARIAL, AdversarialLoss, condition_vector
from distill.matching.times import TimeLaw, draw_times
from distill.roles import Roles

Layers = Annotated[list[str], Field(min_length=1)]
NUDGE = 0.1  #: standard deviation of the noise of the finite-difference R1


class GAN(BaseModel):
    """The adversarial term."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight: Annotated[float, Field(gt=0)] = 3e-3  #: of the generator's loss in the student's
    discriminator_weight: Annotated[float, Field(gt=0)] = 1e-2  #: of the discriminator's in the critic's, on its own features
    #: whose hidden features are judged: the critic's (trained by it too), the frozen teacher's, those of fixed random convolutions
    #: ("random") or of a network pretrained on ImageNet ("projected"); or the import path module:Class of your own (docs/methods/extend.md)
    features: str = "critic"
    conditional: bool = True  #: heads on features that do not see the condition (random, projected, your own) are told it
    layers: Layers = ["mid_block"]  #: module names inside the backbone
    times: TimeLaw = (0.0, 1.0)  #: of its inputs' noise level
    loss: AdversarialLoss = "logistic"
    r1: Annotated[float, Field(ge=0)] = 0.0  #: weight of the penalty on real samples
    r1_form: Literal["finite_difference", "exact"] = "finite_difference"  #: squared change of logits under a nudge, or ½|∇ logit|²
    #: real samples: the data; the student's own with one step more (ASD); or what a consistency function is to be (PCM)
    real: Literal["data", "longer", "target"] = "data"
    mismatched: bool = False  #: real samples with another sample's condition count as fake too (SANA-Sprint)

    @model_validator(mode="after")
    def _possible(self) -> GAN:
        if ":" in self.features:
            import_object(self.features)
        elif self.features not in ("critic", "teacher", "random", "projected"):
            raise ValueError(f"gan.features is critic, teacher, random, projected or an import path module:Class, not {self.features!r}")
        if self.mismatched and not self.on_backbone and not self.conditional:
            raise ValueError("gan.mismatched needs a discriminator that is told the condition: set conditional: true")
        return self

    @property
    def on_backbone(self) -> bool:
        """Whether the features are the critic's or the teacher's."""
        return self.features in ("critic", "teacher")


def logits(gan: GAN, roles: Roles, x: Tensor, condition: Condition, t: Tensor, noise: Tensor, s: Tensor | None = None) -> Tensor:
    """(batch, heads) logits of samples, clean or at s, noised to t; differentiable in x and in the network whose features are judged."""
    return judged(gan, roles, roles.schedule.renoise(x, noise, s, t), t, condition)


def judged(gan: GAN, roles: Roles, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The same for samples that are noised already."""
    assert roles.discriminator is not None
    if not gan.on_backbone:
        told = condition_vector(condition.values, len(x_t), x_t.device) if gan.conditional else None
        return roles.discriminator.of_samples(x_t, t, told)
    network = roles.critic if gan.features == "critic" else roles.teacher
    assert network is not None
    return roles.discriminator(network.features(x_t, t, condition, tuple(gan.layers)))


def student_loss(
    gan: GAN, roles: Roles, x: Tensor, condition: Condition, real: Tensor | None, progress: float, s: Tensor | None = None, below: Tensor | None = None
) -> Tensor:
    """The generator's side. A relativistic one compares with the real samples.

    Args:
        s: (batch,) noise level of the samples, real ones too; None: clean. They are noised further from there, to at most ``below``.
    """
    t, noise = draw_times(gan.times, x, roles.schedule, progress, s, below), torch.randn_like(x)
    fake = logits(gan, roles, x, condition, t, noise, s)
    if gan.loss != "relativistic":
        return ADVERSARIAL[gan.loss].generator(fake, None)
    assert real is not None
    return ADVERSARIAL[gan.loss].generator(fake, logits(gan, roles, real, condition, t, noise, s))


def discriminator_loss(
    gan: GAN, roles: Roles, x: Tensor, condition: Condition, real: Tensor, progress: float, s: Tensor | None = None, below: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The discriminator's side on detached student samples and real ones, equally noised, with R1; and its accuracy."""
    t, noise = draw_times(gan.times, x, roles.schedule, progress, s, below), torch.randn_like(x)
    exact = gan.r1 > 0 and gan.r1_form == "exact"
    clean, told = [x, real], [condition] * 2
    if gan.r1 and not exact:
        clean, told = [*clean, real + NUDGE * torch.randn_like(x)], [*told, condition]
    if gan.mismatched:
        clean, told = [*clean, real], [*told, condition[torch.arange(len(x)).roll(1)]]
    n = len(clean)
    x_t = roles.schedule.renoise(torch.cat(clean), noise.repeat(n, *[1] * (x.dim() - 1)), None if s is None else s.repeat(n), t.repeat(n))
    if exact:
        x_t.requires_grad_()
    answers = judged(gan, roles, x_t, t.repeat(n), cat(told)).split(len(x))
    fake, true = answers[0], answers[1]
    loss = ADVERSARIAL[gan.loss].discriminator(true, fake)
    if gan.mismatched:
        loss = 0.5 * (loss + ADVERSARIAL[gan.loss].discriminator(true, answers[-1]))
    accuracy = 0.5 * ((true > 0).float().mean() + (fake < 0).float().mean())
    if exact:
        (slope,) = torch.autograd.grad(true.mean(1).sum(), x_t, create_graph=True)
        loss = loss + gan.r1 * 0.5 * slope[len(x) : 2 * len(x)].flatten(1).square().sum(1).mean()
    elif gan.r1:
        loss = loss + gan.r1 * (answers[2] - true).square().mean()
    return loss, accuracy
