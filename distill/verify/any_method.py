"""What must hold for every method, also a user's own: checked on an exact Gaussian teacher with small networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from distill.analytic import GaussianMixture, MLPDenoiser, TwoTimeMLP, gaussian
from distill.denoiser import Condition, Denoiser
from distill.experts import ByCondition, ByTime, Routed
from distill.losses.adversarial import Discriminator, feature_body
from distill.methods.base import Batch, Method, Pairs
from distill.roles import Roles
from distill.sampling import renoise_sample
from distill.schedule import CosineVP
from distill.verify.core import Check, at_most, train

TEACHER = gaussian(CosineVP(), (0.5, -0.3), (0.6, 0.9))


def toy_batch(teacher: GaussianMixture, size: int) -> Batch:
    """Noise, real samples, a condition that has a null one, for methods that guide (both mean the one Gaussian that there is), and
    samples of the teacher's exact ODE with the noise that they came from."""
    label, null = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.long)
    told = Condition({"class_labels": label}, {"class_labels": null})
    noise, start, one = torch.randn(size, 2), torch.randn(size, 2), torch.ones(size, dtype=torch.float64)
    made = teacher.flow_map(start * teacher.schedule.initial_scale, one, 0 * one).float()
    return Batch(noise, told, teacher.sample(size), pairs=Pairs(start, made, told))


def toy_roles(method: Method, teacher: GaussianMixture = TEACHER) -> Roles:
    """A two-dimensional Gaussian teacher and MLPs for the roles that the method asks for."""
    torch.manual_seed(0)
    schedule = teacher.schedule
    kind = TwoTimeMLP if method.end_time() else MLPDenoiser
    networks: dict[str, Any] = {role: kind(schedule, 2, width=32, data_std=0.8) for role in method.roles}
    several = method.experts()
    if several is not None:  # the toy's samples are all of the first class
        route = several if isinstance(several, ByTime) else ByCondition.of_classes("class_labels", several.count, several.count)
        networks["student"] = Routed([networks["student"], *(kind(schedule, 2, width=32, data_std=0.8) for _ in range(route.count - 1))], route)
    if "target" in networks:
        networks["target"].load_state_dict(networks["student"].state_dict())
    wanted = method.discriminator_features()
    discriminator = None
    if wanted and wanted[0] in ("critic", "teacher"):
        discriminator = Discriminator({layer: (3,) for layer in wanted[1]})
    elif wanted:
        body = feature_body(wanted[0], (2,))
        features = body(torch.zeros(2, 2), torch.zeros(2))
        discriminator = Discriminator({name: f.shape[1:] for name, f in features.items()}, body=body)
    roles = Roles(teacher, discriminator=discriminator, **networks)
    roles.state = method.initial_state() | method.state_of(roles)
    return roles


def checks(subject: str, method: Method) -> Iterator[Check]:
    """Its losses are finite, each update reaches the roles that it names and changes no other, no graph outlives the update
    that follows it, and students come to resemble the teacher: the one that they were trained on."""
    faults = Counter[str]()
    for progress in (0.0, 0.3, 0.9):  # curricula do other things later on
        faults.update(step_faults(method, progress))
    yield at_most(subject, "losses that are not finite", faults["not finite"], 0)
    yield at_most(subject, "parameters of the named roles that no gradient reaches", faults["unreached"], 0)
    yield at_most(subject, "parameters of the target that a gradient reaches", faults["target reached"], 0)
    yield at_most(subject, "parameters that an update changed without naming their role", faults["changed"], 0)
    yield at_most(subject, "losses whose graph was built before the last update", faults["stale"], 0)

    before = distance(method, toy_roles(method).student, TEACHER)
    right, wrong = trained(method, TEACHER), trained(method, gaussian(TEACHER.schedule, (-0.8, 1.2), (0.3, 0.4)))
    yield at_most(subject, "distance of the student's moments after 400 steps, over that before", distance(method, right, TEACHER) / before, 0.5)
    yield at_most(subject, "ablation: the same after training on another teacher", distance(method, wrong, TEACHER) / before, 0.5, must_fail=True)


def trained(method: Method, teacher: GaussianMixture, steps: int = 400, batch: int = 256) -> Denoiser:
    """A small student of this teacher."""
    roles = toy_roles(method, teacher)
    # A critic that is updated once learns faster in its one update: below four times the student's pace the two swing (TTUR).
    pace = 3 if getattr(method, "critic_steps", None) == 1 else 1
    rates = {role: 2e-3 * (pace if role in ("critic", "winner") else 1) for role in roles.trained()}
    train(method, roles, lambda step: toy_batch(teacher, batch), steps, rates, betas=(0.5, 0.99))
    return roles.student


def step_faults(method: Method, progress: float = 0.0) -> dict[str, int]:
    """What is wrong in one step of the method, counted. After each yield the named roles are nudged in place, as a trainer
    would: a loss whose graph still holds what they were cannot be differentiated any more."""
    roles = toy_roles(method)
    batch = replace(toy_batch(TEACHER, 256), progress=progress)
    own_target = method.target_decay(progress) == 1  # which it sets without a gradient
    parameters = {role: roles.parameters(role) for role in ("student", "critic", "winner", "discriminator", "target")}
    target = parameters["target"]
    for _ in method.step(roles, batch):  # what a method keeps of its networks by now
        pass
    with torch.no_grad():
        for p in parameters["critic"]:  # and the critic has learnt since
            p.mul_(1.1)
        for p in target:  # a target that is the student itself would have gradients of zero
            p.mul_(1.1)
        for p in parameters["discriminator"]:  # untrained logits all lie within a hinge's margin: the gradient of a bias is 1 − 1
            p.mul_(4.0)
    faults = dict.fromkeys(("not finite", "unreached", "target reached", "changed", "stale"), 0)
    kept = {role: [p.detach().clone() for p in group] for role, group in parameters.items()}
    for names, loss, _ in method.step(roles, batch):
        names = (names,) if isinstance(names, str) else names
        watched = [role for role in parameters if not (role == "target" and own_target)]
        faults["changed"] += sum(not torch.equal(p, q) for role in watched for p, q in zip(parameters[role], kept[role], strict=True))
        faults["not finite"] += not bool(torch.isfinite(loss).all())
        own = [p for name in names for p in parameters[name]]
        try:
            gradients = torch.autograd.grad(loss, own + target, allow_unused=True)
        except RuntimeError:
            faults["stale"] += 1
            continue
        reached = [g is not None and bool(g.any()) for g in gradients[: len(own)]]
        faults["unreached"] += len(own) - sum(reached) - (_resting(roles, reached) if names == ("student",) else 0)
        faults["target reached"] += sum(g is not None and bool(g.any()) for g in gradients[len(own) :])
        with torch.no_grad():
            for p in own:
                p.mul_(1.01)
        kept = {role: [p.detach().clone() for p in group] for role, group in parameters.items()}
    return faults


def _resting(roles: Roles, reached: list[bool]) -> int:
    """Parameters of those of a student's networks that nothing of this step is for, and no gradient reaches at all."""
    if not isinstance(roles.student, Routed):
        return 0
    sizes = [len(list(expert.parameters())) for expert in roles.student.experts]
    parts = torch.tensor(reached).split(sizes)
    return sum(len(part) for part in parts if not bool(part.any())) if any(bool(part.any()) for part in parts) else 0


@torch.no_grad()
def distance(method: Method, student: Denoiser, teacher: GaussianMixture) -> float:
    """Fréchet distance of samples to the teacher's Gaussian, dimension by dimension: in one step, but as several networks and
    deterministic trajectories, whose first x0 is no sample, need them."""
    draw = torch.Generator().manual_seed(1)
    noise, sampler = torch.randn(4000, 2, generator=draw), method.sampler()
    in_order = isinstance(student, Routed) or (sampler.gamma == 0 and not sampler.end_time)
    times = sampler.ladder() if in_order else (1.0,)
    x = renoise_sample(student, times, noise, toy_batch(teacher, 4000).condition, draw, sampler.gamma, sampler.end_time).double()
    mean, std = teacher.means[0], teacher.stds[0]
    return float(((x.mean(0) - mean) ** 2 + (x.std(0) - std) ** 2).sum())
