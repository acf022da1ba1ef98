"""The checks of ``distill verify`` that hold for any method find the mistakes that they are for."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import pytest
import torch

from distill.errors import UserError
from distill.methods import Method
from distill.methods.base import Batch, Update
from distill.roles import Roles
from distill.sampling import Sampler
from distill.verify import any_method, checks, run


class Regression(Method):
    """The student and the critic, each regressed onto real samples: sound, but no method of distillation."""

    name: str = "regression"
    roles: ClassVar[Sequence[str]] = ("student", "critic", "target")

    def sampler(self) -> Sampler:
        return Sampler()

    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        for role, network in (("student", roles.student), ("critic", roles.critic)):
            assert network is not None and batch.x0 is not None
            yield role, (network(batch.noise, torch.tensor(1.0)) - batch.x0).square().mean(), {}


class OneGraph(Regression):
    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        assert roles.critic is not None
        loss = (roles.student(batch.noise, torch.tensor(1.0)) - roles.critic(batch.noise, torch.tensor(1.0))).square().mean()
        yield "student", loss, {}
        yield "critic", loss, {}


class Meddling(Regression):
    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        assert roles.critic is not None
        with torch.no_grad():
            next(iter(roles.critic.parameters())).add_(1.0)
        yield from super().step(roles, batch)


class LiveTarget(Regression):
    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        assert roles.target is not None
        t = torch.tensor(1.0)
        yield "student", (roles.student(batch.noise, t) - roles.target(batch.noise, t)).square().mean(), {}


class Infinite(Regression):
    def step(self, roles: Roles, batch: Batch) -> Iterator[Update]:
        for role, loss, logs in super().step(roles, batch):
            yield role, loss / 0, logs


class Demanding(Regression):
    strength: float


@pytest.mark.parametrize(
    ("method", "fault"),
    [(OneGraph, "stale"), (Meddling, "changed"), (LiveTarget, "target reached"), (Infinite, "not finite")],
)
def test_each_mistake_is_found(method: type[Method], fault: str) -> None:
    assert any_method.step_faults(method(name="x"))[fault] > 0
    assert set(any_method.step_faults(Regression(name="x")).values()) == {0}


def test_a_student_of_unpaired_data_does_not_pass() -> None:
    """Regression onto samples that have nothing to do with the noise learns their mean."""
    found = {c.name: c.passed for c in any_method.checks("x", Regression(name="x"))}
    assert not found["distance of the student's moments after 400 steps, over that before"]


def test_methods_by_import_path() -> None:
    assert all(c.passed for c in checks("distill.methods.consistency:Consistency"))
    with pytest.raises(UserError, match="strength"):
        list(checks(f"{__name__}:Demanding"))
    with pytest.raises(UserError, match="did you mean 'dmd2'"):
        list(checks("dmd22"))
    with pytest.raises(UserError, match="no divergence 'kl'"):
        list(checks("dmd2", ["kl"]))
    with pytest.raises(UserError, match="setting of dmd2"):
        run(["consistency"], ["neyman"])
