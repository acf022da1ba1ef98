"""``distill plan``: what a run will take, from configuration files alone; nothing is downloaded, allocated or trained.

The roles of the run are built on the meta device and one step of its method is weighed (``plan_trace.py``):

    peak = weights + gradients + optimizer states + averaged weights + data + activations,   at the moment when the sum is largest

Where that does not fit a GPU, settings that take less are tried in order of harm (``plan_advice.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import Config
from distill.data.prompts import read_prompts
from distill.denoiser import BackboneDenoiser, Condition
from distill.experts import networks_of
from distill.methods.base import Batch, Pairs
from distill.plan_calls import average_calls
from distill.plan_pipeline import hollow_teacher
from distill.plan_trace import Precision, Scale, Trace, checkpoint_blocks, trace_step
from distill.run import DTYPES, Parts, assemble, mixed_precision
from distill.teacher import Teacher

GIB = 1 << 30
#: States per parameter of each optimizer, in bytes where they do not have the parameter's type (8-bit: with its scales).
STATES = {"adamw": 2, "adam": 2, "radam": 2, "sgd": 1}
EIGHT_BIT = 2 * (1 + 4 / 256)
#: Bytes per weight of a quantized teacher: the number and its share of a scale.
QUANTIZED = {"8bit": 1.0 + 4 / 64, "4bit": 0.5 + 4 / 64, "int8": 1.0 + 4 / 64, "int4": 0.5 + 4 / 128, "float8": 1.0 + 4 / 64}
#: Libraries of matrix products keep buffers on a GPU.
CUDA_WORKSPACE = 64 << 20
LATE = 0.9  #: the progress of the step that is weighed: what a method does at first only may leave out networks
AVERAGED, OPTIMIZER, DATA = "averaged weights", "optimizer states", "data"


@dataclass(frozen=True)
class Memory:
    """The settings of a recipe that trade memory for something, read where they are set."""

    checkpointing: bool = False
    offload: bool = False
    quantize: str = "none"  #: or a key of ``QUANTIZED``
    ema_dtype: str = "float32"
    ema_device: str = "same"

    @classmethod
    def of(cls, config: Config) -> Memory:
        trainer, student, teacher = config.trainer, config.student, config.teacher
        return cls(trainer.gradient_checkpointing, trainer.offload, teacher.quantize, student.ema_dtype, student.ema_device)


@dataclass
class Plan:
    """What a run takes. Sizes in bytes, work in floating-point operations."""

    pipeline: str
    backbone: str
    method: str
    sample_shape: tuple[int, ...]
    batch_size: int
    accumulate: int
    device: str
    parameters: dict[str, dict[str, int]]  #: role → {"parameters", "trained"}
    memory: dict[str, int]  #: part → bytes at the peak
    during: str  #: what runs at the peak
    calls: list[dict[str, Any]]  #: role, batch, forwards per step
    updates: dict[str, int]  #: role → updates per step
    flops: dict[str, int]  #: what → floating-point operations per step
    disk: dict[str, int]
    before: dict[str, int]  #: on the device before training: encoders that make the conditions
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "peak": self.peak, "flops_per_step": sum(self.flops.values())}


def make_plan(config: Config, device: str | None = None, memory: Memory | None = None) -> Plan:
    """Plan a run.

    Args:
        device: "cuda" or "cpu"; what the recipe means here if not given.
        memory: in place of the recipe's own settings.

    Raises:
        UserError: if the teacher's configuration cannot be found or understood.
    """
    memory = memory or Memory.of(config)
    device = device or ("cuda" if config.trainer.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    section = config.teacher
    teacher = hollow_teacher(section.pipeline, DTYPES[section.dtype], section.revision, section.call, section.override)
    return plan_of(config, teacher, device, memory)


def plan_of(config: Config, teacher: Teacher, device: str, memory: Memory) -> Plan:
    """The plan of a run whose teacher is built already; its backbone is used up."""
    with torch.device("meta"):
        parts = assemble(_without_hardware(config), teacher)
    roles, settings = parts.roles, config.trainer
    precision = Precision({"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision(config)], device == "cuda")
    for network in _networks(parts) if memory.checkpointing else ():
        ends = [n.end_time for role in ("student", "target") for n in networks_of(getattr(roles, role)) if n.backbone is network.backbone and n.end_time]
        checkpoint_blocks(network.backbone, precision, parts.adapters or network.masters, *ends)
    condition = teacher.condition([teacher.placeholder()])
    samples, inputs = _data_size(config, teacher)
    one_condition = sum(_nbytes(v) for v in (*condition.values.values(), *(condition.null or {}).values()))
    one_sample = _product(teacher.sample_shape) * torch.empty((), dtype=teacher.denoiser.dtype).element_size()
    # Encoded prompts are read from the disk, batch by batch; latents stay on the device.
    on_disk = inputs * one_condition if config.data.cache and teacher.input_name == "prompt" else 0
    latents = samples * one_sample if config.method.needs_images() else 0
    data = latents + inputs * one_condition - on_disk
    weights = _weights(parts)
    away = _idle(parts, weights) if memory.offload else {}
    notes: list[str] = []

    def standing(scale: Scale) -> None:
        for tag, tensors in weights.items():
            for tensor in tensors:
                scale.add(tensor, tag)
        for tag, size in away.values():
            scale.hold(tag, -size)
        scale.forget()
        scale.hold(OPTIMIZER, sum(_state_bytes(config, role, roles.parameters(role)) for role in roles.trained()))
        if config.student.ema and memory.ema_device == "same":
            scale.hold(AVERAGED, _averaged_bytes(roles.parameters("student"), memory))
        scale.hold(DATA, data)

    batches = [_batch(config, teacher, condition) for _ in range(min(settings.accumulate, 2))]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            trace = trace_step(config.method, roles, batches, standing, precision, away)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        scale = Scale()
        standing(scale)
        trace = Trace(dict(scale.alive), during="activations are not estimated")
        reason = f"a step of {config.method.name} on {type(teacher.backbone).__name__} looks at values, which a plan does not have"
        notes.append(f"activations and work are not estimated: {reason} ({str(error).splitlines()[0][:100]})")
    factor = settings.accumulate / len(batches)
    calls, flops = _on_average(config, parts, batches[0], trace, len(batches))
    peak = dict(trace.peak)
    if memory.quantize != "none":
        teachers = next(iter(weights))
        peak[teachers] = max(0, peak[teachers] - _quantization_saves(weights[teachers], memory.quantize))
    if device == "cuda":
        peak["workspaces"] = CUDA_WORKSPACE
    return Plan(
        type(teacher.pipeline).__name__, type(teacher.backbone).__name__, config.method.name, teacher.sample_shape, settings.batch_size, settings.accumulate,
        device, _parameters(parts), {k: v for k, v in peak.items() if v}, trace.during,
        [{"role": role, "batch": batch, "forwards": round(n * settings.accumulate, 2)} for (role, batch), n in sorted(calls.items())],
        {role: round(count / len(batches)) for role, count in trace.backwards.items()}, {k: round(v * factor) for k, v in flops.items()},
        _disk(config, parts, on_disk + latents * (config.data.cache and config.data.source == "images")), _encoders(teacher), notes,
    )


def _on_average(config: Config, parts: Parts, batch: Batch, trace: Trace, micro: int) -> tuple[Mapping[tuple[str, int], float], Mapping[str, float]]:
    """Calls of one micro-batch, and the work of all that were traced, for a method that draws its number of steps."""
    traced = Counter({key: n // micro for key, n in trace.forwards.items()})
    if not traced:
        return {}, {}
    calls = average_calls(config.method, parts.roles, batch, trace.features, Counter(traced))
    flops: dict[str, float] = dict(trace.flops)
    for role in {role for role, _ in traced}:
        samples, expected = (sum(n * size for (r, size), n in found.items() if r == role) for found in (trace.forwards, calls))
        flops[f"{role} forward"] *= expected * micro / samples
    return calls, flops


# -- sizes --------------------------------------------------------------------------------------------------------------


def _weights(parts: Parts) -> dict[str, list[Tensor]]:
    """Every tensor that stands by the role that it belongs to. The teacher's come first: what it shares is its own."""
    shared = parts.adapters is not None
    found: dict[str, list[Tensor]] = {("shared backbone" if shared else "teacher") + " weights": _tensors_of(parts.teacher.backbone)}
    roles = parts.roles
    for role in ("student", "critic", "winner", "target"):
        networks = networks_of(getattr(roles, role))
        if networks:
            adapter = networks[0].backbone is parts.teacher.backbone
            found[f"{role} weights"] = list(roles.parameters(role)) if adapter else [t for n in networks for t in _tensors_of(n.backbone)]
    companions = [t for c in parts.teacher.denoiser.companions for t in _tensors_of(c.module)]
    if companions:
        found["companion weights"] = companions
    if roles.discriminator is not None:
        found["discriminator weights"] = _tensors_of(roles.discriminator)
    seen: set[int] = set()
    own = {id(p) for role in ("student", "critic", "winner", "target") for p in roles.parameters(role)} if shared else set()
    for tag, tensors in found.items():
        skip = own if tag.startswith(("shared", "teacher")) else set()
        found[tag] = [t for t in tensors if id(t) not in skip and t.untyped_storage()._cdata not in seen]
        seen |= {t.untyped_storage()._cdata for t in found[tag]}
    return found


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _networks(parts: Parts) -> list[BackboneDenoiser]:
    """One per backbone."""
    networks = [n for role in ("teacher", "student", "critic", "winner", "target") for n in networks_of(getattr(parts.roles, role))]
    return list({id(n.backbone): n for n in networks}.values())


def _parameters(parts: Parts) -> dict[str, dict[str, int]]:
    count = {"teacher": sum(t.numel() for t in parts.teacher.backbone.parameters())}
    roles = parts.roles
    if parts.adapters is not None:
        adapted = [r for r in ("student", "critic", "winner", "target") if any(n.backbone is parts.teacher.backbone for n in networks_of(getattr(roles, r)))]
        count["teacher"] -= sum(p.numel() for role in adapted for p in roles.parameters(role))
    table = {"teacher": {"parameters": count["teacher"], "trained": 0}}
    for role in ("student", "critic", "winner", "target", "discriminator"):
        own = sum(p.numel() for p in roles.parameters(role))
        if getattr(roles, role) is not None:
            apart = [n for n in networks_of(getattr(roles, role)) if n.backbone is not parts.teacher.backbone]
            whole = sum(p.numel() for n in apart for p in n.backbone.parameters()) if apart else own
            table[role] = {"parameters": whole, "trained": own if role in roles.trained() else 0}
    return table


def _state_bytes(config: Config, role: str, parameters: list[nn.Parameter]) -> int:
    name = config.optimizers.of(role).name
    if "8bit" in name:
        return round(EIGHT_BIT * sum(p.numel() for p in parameters))
    return sum(STATES.get(name, 2) * p.numel() * p.element_size() for p in parameters)


def _averaged_bytes(parameters: list[nn.Parameter], memory: Memory) -> int:
    return sum(p.numel() * (2 if memory.ema_dtype == "bfloat16" else 4) for p in parameters)


def _quantization_saves(weights: list[Tensor], bits: str) -> int:
    """Bytes: the matrices (of linear layers) are quantized, convolutions and norms are not."""
    matrices = [t for t in weights if t.dim() == 2]
    return sum(t.nbytes for t in matrices) - round(QUANTIZED[bits] * sum(t.numel() for t in matrices))


def _idle(parts: Parts, weights: Mapping[str, list[Tensor]]) -> dict[str, tuple[str, int]]:
    """role → (part, bytes) of the weights that wait on the CPU with ``trainer.offload``: never those of a shared backbone."""
    tags = {role: f"{role} weights" for role in ("teacher", "target")}
    return {role: (tag, sum(t.nbytes for t in weights[tag])) for role, tag in tags.items() if parts.adapters is None and tag in weights}


def _data_size(config: Config, teacher: Teacher) -> tuple[int, int]:
    """(real samples, different inputs) that stay on the device."""
    section = config.data
    if section.source == "digits":
        from distill.data.digits import load_digits

        return len(load_digits(section.split)[0]), teacher.classes or 1
    if section.source == "images":
        from distill.data.images import list_folder

        assert section.path is not None
        paths, inputs = list_folder(section.path.expanduser(), teacher.input_name, teacher.classes)
        return len(paths), len(set(inputs))
    if section.source == "prompts":
        assert section.path is not None
        return 0, len(set(read_prompts(section.path.expanduser())))
    return 0, teacher.classes or 1


def _disk(config: Config, parts: Parts, cached: int) -> dict[str, int]:
    """A checkpoint holds what is trained, its optimizers' states and the averages; the newest few are kept, and one is being written."""
    roles = parts.roles
    held = [p for role in (*roles.trained(), "target") for p in roles.parameters(role)]
    averaged = _averaged_bytes(roles.parameters("student"), Memory.of(config)) if config.student.ema else 0
    checkpoint = sum(p.nbytes for p in held) + averaged + sum(_state_bytes(config, role, roles.parameters(role)) for role in roles.trained())
    exported = 0
    for student in parts.student.networks:
        with student.use():  # weights in the dtype that they compute in
            exported += sum(p.nbytes for p in (student.parameters() if parts.adapters is not None else student.backbone.parameters()))
    return {"checkpoint": checkpoint, "checkpoints": checkpoint * (config.trainer.keep_checkpoints + 1), "cache": cached, "export": exported}


def _encoders(teacher: Teacher) -> dict[str, int]:
    """Networks that make conditions and decode samples: on the device before and between training."""
    return {name: sum(t.nbytes for t in _tensors_of(network)) for name, network in teacher.encoders()}


def _batch(config: Config, teacher: Teacher, condition: Condition) -> Batch:
    size, shape = config.trainer.batch_size, teacher.sample_shape
    noise = torch.empty(size, *shape, device="meta")
    x0 = torch.empty(size, *shape, device="meta", dtype=teacher.denoiser.dtype) if config.method.needs_images() else None
    told = condition[[0] * size] if condition.values else condition
    pairs = Pairs(noise, torch.empty_like(noise), told) if config.method.needs_pairs() is not None else None
    return Batch(noise, told, x0, LATE, pairs=pairs)


def _without_hardware(config: Config) -> Config:
    """The recipe without the settings that need real weights or kernels: they are planned in ways of their own."""
    teacher = config.teacher.model_copy(update={"quantize": "none"})
    trainer = config.trainer.model_copy(update={"gradient_checkpointing": False, "offload": False, "attention": "default"})
    return config.model_copy(update={"teacher": teacher, "trainer": trainer})


def _nbytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else sum(v.nbytes for v in value if isinstance(v, Tensor))


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
