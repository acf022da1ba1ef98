"""What must hold for every method, also a user's own: checked on an exact Gaussian teacher with small networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from distill.analytic import MLPDenoiser, gaussian
from distill.denoiser import Condition, Denoiser
from distill.losses.adversarial import Discriminator
from distill.methods.base import Batch, Method
from distill.roles import Roles
from distill.schedule import CosineVP
from distill.verify.core import Check, at_most, train


def toy_roles(method: Method) -> Roles:
    """A two-dimensional Gaussian teacher and MLPs for the roles that the method asks for."""
    torch.manual_seed(0)
    schedule = CosineVP()
    teacher = gaussian(schedule, (0.5, -0.3), (0.6, 0.9))
    networks: dict[str, MLPDenoiser] = {role: MLPDenoiser(schedule, 2, width=32, data_std=0.8) for role in method.roles}
    if "target" in networks:
        networks["target"].load_state_dict(networks["student"].state_dict())
    wanted = method.discriminator_features()
    discriminator = Discriminator({layer: (3,) for layer in wanted[1]}) if wanted else None
    return Roles(teacher, discriminator=discriminator, state=method.initial_state(), **networks)  # type: ignore[arg-type]


def checks(subject: str, method: Method) -> Iterator[Check]:
    """Its losses are finite, each update reaches the roles that it names and no other, and students come to resemble the
    teacher's samples more than they did."""
    roles = toy_roles(method)
    assert isinstance(roles.teacher, Denoiser)
    x0 = roles.teacher.sample(256)  # type: ignore[attr-defined]
    batch = Batch(torch.randn(256, 2), Condition(), x0)
    unreached, strays, bad = 0.0, 0.0, 0.0
    everything = {role: roles.parameters(role) for role in roles.trained()}
    for names, loss, _ in method.step(roles, batch):
        names = (names,) if isinstance(names, str) else names
        bad += float(not torch.isfinite(loss).all())
        own = [p for name in names for p in everything[name]]
        for grad in torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True):
            unreached += float(grad is None or not bool(grad.any()))
        others = [p for p in (roles.target.parameters() if roles.target is not None else ())]
        grads = torch.autograd.grad(loss, others, allow_unused=True) if others else []
        strays += sum(float(g is not None and bool(g.any())) for g in grads)
    yield at_most(subject, "losses that are not finite", bad, 0.0)
    yield at_most(subject, "parameters of the named roles that no gradient reaches", unreached, 0.0)
    yield at_most(subject, "parameters of the target that a gradient reaches", strays, 0.0)

    before = distance(roles.student, roles)
    roles = toy_roles(method)
    fresh = copy.deepcopy(roles.student)
    rates = {role: 2e-3 for role in roles.trained()}
    train(method, roles, lambda step: Batch(torch.randn(256, 2), Condition(), roles.teacher.sample(256)), 400, rates, betas=(0.5, 0.99))  # type: ignore[attr-defined]
    yield at_most(subject, "distance of the student's moments after 400 steps, over that before", distance(roles.student, roles) / before, 0.5)
    yield at_most(subject, "ablation: the same without training", distance(fresh, roles) / before, 0.5, must_fail=True)


@torch.no_grad()
def distance(student: Denoiser, roles: Roles) -> float:
    """Fréchet distance of one-step samples to the teacher's Gaussian, dimension by dimension."""
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    x = student(noise, torch.tensor(1.0, dtype=torch.float64)).double()
    teacher = roles.teacher
    mean, std = teacher.means[0], teacher.stds[0]  # type: ignore[attr-defined]
    return float(((x.mean(0) - mean) ** 2 + (x.std(0) - std) ** 2).sum())
