"""VSD (SwiftBrush): the first update under a fresh LoRA critic, where guidance on both ends, and what happens without a critic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distill.adapters import LoRA
from distill.analytic import AffineGenerator, ExactCritic, gaussian
from distill.denoiser import Condition, Prediction
from distill.loading import load_pipeline
from distill.methods.base import Batch
from distill.methods.distribution import DistributionMatching
from distill.methods.vsd import VSD
from distill.resources import resource
from distill.roles import Roles, build_roles
from distill.schedule import CosineVP
from distill.teacher import Teacher
from distill.verify.classes import SIGMA, TILTED, end_point, largest_error, level
from distill.verify.core import Check, at_most, descend, student_loss
from distill.verify.dmd2 import independent_normals


def checks() -> Iterator[Check]:
    yield from fresh_adapter_checks()
    t = (level(SIGMA), level(SIGMA))
    for w, tilted in TILTED.items():
        both = end_point(VSD(guidance_scale=w, score_times=t))
        yield at_most("vsd", f"both guided, w = {w:g}: two classes end at +1, 1: {both[0]:.3f}, {both[1]:.3f}", largest_error(both, (1.0, 1.0)), 0.01)
        alone = end_point(VSD(guidance_scale=w, critic_guidance_scale=1.0, critic_null=0.0, score_times=t))
        where = f"{alone[0]:.3f}, {alone[1]:.3f}"
        yield at_most("vsd", f"ablation: the teacher alone guided, w = {w:g}: {where}", largest_error(alone, (1.0, 1.0)), 0.01, must_fail=True)
        yield at_most("vsd", f"the teacher alone guided, w = {w:g}: the tilted law's {tilted[0]:.3f}, {tilted[1]:.3f}", largest_error(alone, tilted), 0.01)
    method = VSD(guidance_scale=1.0, critic_guidance_scale=1.0, critic_null=0.0)
    yield at_most("vsd", "width of a student of N(0, 1), off by", abs(settled(method) - 1), 1e-3)
    yield at_most("vsd", "ablation: no critic (SDS), off by", abs(settled(method, sds=True) - 1), 1e-3, must_fail=True)


# -- the critic as an adapter on the teacher ----------------------------------------------------------------------------


def fresh_adapter_checks() -> Iterator[Check]:
    """On the digits teacher: with a fresh adapter teacher and critic are the same function, bit by bit, and the student stands still."""
    for fails, method in ((False, VSD()), (True, VSD(critic_guidance_scale=1.0, critic_null=0.0))):
        teacher = Teacher(load_pipeline(str(resource("assets/digits-teacher"))))
        roles, adapters = build_roles(teacher, method.roles, critic_lora=LoRA(rank=4, alpha=8))
        assert adapters is not None and roles.critic is not None
        torch.manual_seed(0)
        batch = Batch(torch.randn(4, *teacher.sample_shape), teacher.condition([0, 1, 2, 3]))
        name = "a fresh LoRA critic: largest gradient of the student"
        name = f"ablation: {name}, the teacher alone guided" if fails else name
        yield at_most("vsd", name, largest_gradient(method, roles, batch), 0, must_fail=fails)
        if fails:
            continue
        before = teacher.denoiser(batch.noise, torch.tensor(0.5), batch.condition)
        with torch.no_grad():
            for p in roles.parameters("critic"):
                p.add_(0.1 * torch.randn_like(p))
        after = teacher.denoiser(batch.noise, torch.tensor(0.5), batch.condition)
        yield at_most("vsd", "a trained LoRA critic: change of the teacher", float((after - before).abs().max()), 0)
        yield at_most("vsd", "ablation: a trained LoRA critic: largest gradient of the student", largest_gradient(method, roles, batch), 0, must_fail=True)


def largest_gradient(method: DistributionMatching, roles: Roles, batch: Batch) -> float:
    _, loss, _ = next(iter(method.step(roles, batch)))
    return max(float(g.abs().max()) for g in torch.autograd.grad(loss, roles.parameters("student")))


# -- no critic ----------------------------------------------------------------------------------------------------------


class NoCritic(AffineGenerator):
    """Score distillation sampling (SDS, DreamFusion) has the noise itself in the critic's place: D_F = x."""

    def __init__(self, generator: AffineGenerator, x: Tensor) -> None:
        self.generator, self.schedule, self.noise = generator, generator.schedule, x

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition | None = None, features: Sequence[str] = ()) -> Prediction:
        return Prediction(self.generator(self.noise, torch.ones(())), "x0", x_t, t, self.schedule)


def settled(method: DistributionMatching, sds: bool = False, steps: int = 200) -> float:
    """The width at which a student of N(0, 1) comes to rest, in units of the teacher's."""
    schedule = CosineVP()
    generator, z = AffineGenerator(schedule, (0.5,), (0.7,)), independent_normals(2048)[0]
    critic = NoCritic(generator, z) if sds else ExactCritic(generator)
    roles = Roles(gaussian(schedule, (0.0,), (1.0,)), generator, critic)
    torch.manual_seed(0)
    descend(generator.parameters(), lambda: student_loss(method, roles, Batch(z, Condition())), steps, 0.05)
    return float(generator.std.detach().abs())
