"""The training loop. One training step can be read top to bottom in ``Trainer.step``.

All randomness of a step is a function of (seed, step, process): the order of the data, and the global random state, which
is seeded anew at each step. So nothing about randomness needs saving, and a run that was killed writes, once resumed, the
losses of one that was not.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, set_seed
from torch import Tensor

from distill import checkpoint
from distill.config import Config
from distill.data.loader import cache_folder, load_data
from distill.data.pairs import PairData, make_pairs
from distill.errors import UserError
from distill.experts import ByTime, Routed, networks_of, of_prompts
from distill.logs import RunLog
from distill.methods.base import Batch
from distill.optim import build_optimizer, rate_at
from distill.roles import average
from distill.run import DTYPES, Parts, build, mixed_precision, restore, restore_route

MAX_BAD_STEPS = 10  #: this many updates in a row with a loss or gradient that is not finite stop the run


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped after {step} steps")
        self.signum, self.step = signum, step


class Trainer:
    """A run: networks, optimizers, data, and the loop over them.

    Args:
        folder: of the run; exists and holds config.yaml.
        resume: continue from the newest checkpoint there, if any.
    """

    def __init__(self, config: Config, folder: Path, resume: bool = False) -> None:
        self.config, self.folder, self.method = config, folder, config.method
        settings = config.trainer
        _forget_earlier_runs()
        self.accelerator = Accelerator(
            cpu=settings.device == "cpu", mixed_precision=mixed_precision(config),
            # Cached casts of a no_grad forward would cut the graph of the next forward of the same weights.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )
        self.device = self.accelerator.device
        set_seed(config.seed)
        self.parts: Parts = build(config, self.device)
        self.roles = self.parts.roles
        with self.accelerator.main_process_first():  # the others find everything in the cache
            self.data = load_data(config.data, self.parts.teacher, self.method.needs_images(), seed=config.seed)
        if isinstance(student := self.roles.student, Routed):
            student.route = of_prompts(student.route, self.data.told, len(self.data)) or student.route
        self.pairs = self._make_pairs()
        self.parts.teacher.rest_encoders(but_decoder=self.method.needs_decoder())
        self.parameters = {role: self.roles.parameters(role) for role in self.roles.trained()}
        self.optimizers = {
            role: self.accelerator.prepare(build_optimizer(config.optimizers.of(role), parameters))
            for role, parameters in self.parameters.items()
        }
        self.roles.forget = lambda role: self.optimizers[role].state.clear()
        named = self.parts.student.denoiser.named_parameters()
        self.ema = {k: self._averaged_copy(v) for k, v in named.items()} if config.student.ema else {}
        self.start = 0
        self.bad_steps = dict.fromkeys(self.parameters, 0)
        self._signal: int | None = None
        saved = checkpoint.steps(folder / "checkpoints") if resume else []
        if saved:
            self._load(saved[-1])
        if settings.compile:
            self._compile()

    def _make_pairs(self) -> PairData | None:
        """The teacher's samples that the method wants; made before training, or read from the cache."""
        wanted, config = self.method.needs_pairs(), self.config
        if wanted is None:
            return None
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        made = make_pairs(
            self.parts.teacher, self.data, wanted, config.teacher.steps, cache_folder(config.data), config.trainer.batch_size, config.seed, process,
        )
        self.parts.rest()
        return made

    # -- the loop -------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step, with checkpoints and samples on the way.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with everything saved.
            UserError: if training has become impossible; says which setting helps.
        """
        settings = self.config.trainer
        main = self.accelerator.is_main_process
        log = RunLog(self.folder, self.start, settings.steps) if main else None
        try:
            with self._signals():
                for step in range(self.start, settings.steps):
                    values = self.step(step)
                    done = step + 1
                    if log is not None:
                        log.advance()
                        if step % settings.log_every == 0 or done == settings.steps:
                            log.write(step, {k: float(v) for k, v in values.items()})
                        if settings.sample_every and done % settings.sample_every == 0:
                            self.save_samples(done)
                    signum = self._asked_to_stop()
                    if done % settings.checkpoint_every == 0 or done == settings.steps or signum is not None:
                        self.save(done)
                    if signum is not None:
                        raise Interrupted(signum, done)
        finally:
            if log is not None:
                log.close()

    def step(self, step: int) -> dict[str, Tensor | float]:
        """One training step: the method's updates in the paper's order, each on its own role's parameters."""
        settings = self.config.trainer
        rank = self.accelerator.process_index
        torch.manual_seed(mix_seed(self.config.seed, step, rank))
        progress = step / settings.steps
        updates = [self.method.step(self.roles, self._batch(step, i, progress)) for i in range(settings.accumulate)]
        values: dict[str, Tensor | float] = {}
        while True:
            roles: tuple[str, ...] = ()
            for update in updates:  # the micro-batches advance in lockstep; their gradients add up
                with self.accelerator.autocast():
                    item = next(update, None)
                if item is None:
                    self._share_state()
                    return values
                role, loss, logs = item
                roles = (role,) if isinstance(role, str) else role
                inputs = [p for r in roles for p in self.parameters[r]]
                self.accelerator.backward(loss / len(updates), inputs=inputs)
            self.parts.rest()
            values |= {f"{roles[0]}/loss": loss.detach()} | {f"{roles[0]}/{k}": v for k, v in logs.items()}
            for role in roles:
                values[f"{role}/grad_norm"] = self._update(role, step)
            if "student" in roles:
                self._follow(step, progress)

    def _batch(self, step: int, micro: int, progress: float) -> Batch:
        settings = self.config.trainer
        index = (step * settings.accumulate + micro) * self.accelerator.num_processes + self.accelerator.process_index
        drawn = self.data.batch(index, settings.batch_size)
        noise = torch.randn(settings.batch_size, *self.parts.teacher.sample_shape, device=self.device)
        pairs = None
        if self.pairs is not None:  # each process has its own
            pairs = self.pairs.batch(step * settings.accumulate + micro, settings.batch_size)
        return Batch(noise, drawn.condition, drawn.x0, progress, drawn.group, drawn.inputs, pairs)

    def _share_state(self) -> None:
        """The method's running statistics, averaged over the processes: each sees samples of its own."""
        if self.accelerator.num_processes > 1:
            for value in self.roles.state.values():
                value.copy_(self.accelerator.reduce(value.clone(), "mean"))

    def _update(self, role: str, step: int) -> float:
        """Clip and apply the gradients of one role; a step whose gradient is not finite is dropped and reported."""
        parameters, optimizer = self.parameters[role], self.optimizers[role]
        settings = self.config.optimizers.of(role)
        if self.accelerator.num_processes > 1:
            self._share_gradients(parameters)
        steps = self.config.trainer.steps
        start, end = self.method.stretch(step / steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate_at(settings, step - start * steps, (end - start) * steps)
        self.accelerator.unscale_gradients(optimizer)
        limit = settings.clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        scaled = self.accelerator.scaler is not None  # a loss scaler drops such steps itself, and lowers its scale
        finite = math.isfinite(norm)
        self.bad_steps[role] = 0 if finite else self.bad_steps[role] + 1
        if self.bad_steps[role] >= MAX_BAD_STEPS:
            raise UserError(
                f"step {step}: the gradient of the {role} was not finite {MAX_BAD_STEPS} times in a row; the last good checkpoint "
                f"is kept in {self.folder / 'checkpoints'}: lower optimizers.{role}.lr, clip lower, or leave out mixed_precision"
            )
        if scaled or finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _share_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """The mean over the processes. Some of a student's networks may have had no sample in this one's batch, but in another's."""
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        for p, count in zip(parameters, self.accelerator.reduce(there, "sum").tolist(), strict=True):
            if count:
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")

    def _follow(self, step: int, progress: float) -> None:
        """After a student update: the averaged weights and the method's target."""
        student = self.parameters["student"]
        if self.ema:
            decay = min(self.config.student.ema, (1 + step) / (10 + step))
            average(self.ema.values(), student, decay, mix_seed(self.config.seed, step, 1))
        if self.roles.target is not None and (decay := self.method.target_decay(progress)) < 1:
            average(self.roles.target.parameters(), student, decay, mix_seed(self.config.seed, step, 2))

    def _averaged_copy(self, parameter: Tensor) -> Tensor:
        section = self.config.student
        device = torch.device("cpu") if section.ema_device == "cpu" else parameter.device
        return parameter.detach().to(device, DTYPES[section.ema_dtype], copy=True)

    # -- samples --------------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with its averaged weights; the trained ones come back at the end."""
        if not self.ema:
            yield
            return
        student = self.parameters["student"]
        trained = [p.detach().clone() for p in student]
        average(student, self.ema.values(), 0.0)
        try:
            yield
        finally:
            average(student, trained, 0.0)

    def sample_inputs(self) -> list[Any]:
        """What the sample grids show: the recipe's choice, or every class, or the first prompts."""
        chosen = self.config.trainer.sample_inputs
        if chosen is not None:
            return list(chosen)
        classes = self.parts.teacher.classes
        if classes is not None:
            return [i % classes for i in range(max(classes, 10))] if classes <= 32 else list(range(16))
        return self.data.examples(8)

    def save_samples(self, step: int) -> None:
        """A grid of the averaged student's samples from fixed noise, as PNG."""
        from torchvision.utils import save_image

        inputs = self.sample_inputs()
        with self.averaged():
            images = self.parts.student.images(inputs, generator=torch.Generator().manual_seed(self.config.seed))
        path = self.folder / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(images, path, nrow=len(inputs), padding=1)

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write a checkpoint after ``step`` steps."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {f"ema/{k}": v for k, v in self.ema.items()}
        for role in (*self.parameters, *(("target",) if self.roles.target is not None else ())):
            tensors |= {f"{role}/{k}": v for k, v in self.roles.named_parameters(role).items()}
        for role, optimizer in self.optimizers.items():
            tensors |= checkpoint.optimizer_tensors(optimizer, f"optimizer.{role}")
        tensors |= {f"state/{k}": v for k, v in self.roles.state.items()}
        scaler = self.accelerator.scaler
        facts: dict[str, Any] = {"scaler": scaler.state_dict() if scaler is not None else None, "bad_steps": self.bad_steps}
        if isinstance(self.roles.student, Routed) and not isinstance(self.roles.student.route, ByTime):
            facts["route"] = self.roles.student.route.facts()
        checkpoint.save(self.folder / "checkpoints", step, tensors, facts, self.config.trainer.keep_checkpoints)

    def _load(self, step: int) -> None:
        tensors, facts = checkpoint.load(self.folder / "checkpoints", step)
        restore_route(self.roles, facts)
        for role in (*self.parameters, *(("target",) if self.roles.target is not None else ())):
            restore(self.roles.named_parameters(role), tensors, role)
        for role, optimizer in self.optimizers.items():
            checkpoint.restore_optimizer(optimizer, tensors, f"optimizer.{role}")
        for name, value in self.ema.items():
            value.copy_(_required(tensors, f"ema/{name}"))
        for name, value in self.roles.state.items():
            value.copy_(_required(tensors, f"state/{name}"))
        if self.accelerator.scaler is not None and facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.start, self.bad_steps = step, facts["bad_steps"]

    # -- odds and ends --------------------------------------------------------------------------------------------------

    def _compile(self) -> None:
        roles = (self.roles.teacher, self.roles.student, self.roles.critic, self.roles.winner, self.roles.target)
        for backbone in {id(n.backbone): n.backbone for role in roles for n in networks_of(role)}.values():
            backbone.compile()

    def _asked_to_stop(self) -> int | None:
        """The signal that any of the processes has got: all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self._signal
        got = self.accelerator.gather(torch.tensor([self._signal or 0], device=self.device))
        return int(got.max()) or None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run after the current step, saved; a second one ends it at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = signum

        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)


def _forget_earlier_runs() -> None:
    """accelerate keeps device and precision for the life of a process; the next run of the process may have others."""
    alone = PartialState._shared_state.get("num_processes", 1) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)


def mix_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers, as different as can be for neighbouring ones."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _required(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"the checkpoint does not fit this recipe: {name} is missing")
    return tensors[name]
