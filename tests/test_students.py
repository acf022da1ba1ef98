"""Kinds of students: adapters with magnitudes, selected layers, smaller architectures. Each starts as the teacher (or a known
part of it), trains what it should and nothing else, and comes back as a stock pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel
from tiny import perturb, tiny_stable_diffusion, tiny_unet2d, unet2d

from distill.adapters import Adapters, LoRA, inside_a_block, lora_targets
from distill.denoiser import Condition
from distill.errors import UserError
from distill.export import export_diffusers
from distill.methods.base import Batch, Method
from distill.methods.consistency import Consistency
from distill.methods.dmd2 import DMD2
from distill.roles import Roles, build_roles
from distill.sampling import Sampler, uniform_ladder
from distill.selection import Selection, shared_copy
from distill.smaller import kept_block, shrunk, source_of
from distill.student import Student
from distill.teacher import Teacher

FACTS: dict[str, Any] = {"method": "dmd2", "teacher_name": "owner/teacher"}


def fresh_teacher() -> tuple[Teacher, torch.Tensor, torch.Tensor, Condition]:
    teacher = Teacher(tiny_unet2d())
    return teacher, torch.randn(2, *teacher.sample_shape), torch.full((2,), 0.7, dtype=torch.float64), teacher.condition([3, 7])


def transformer(layers: int = 5, **settings: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "sample_size": 8, "norm_num_groups": 4}
    return DiTTransformer2DModel(num_layers=layers, num_embeds_ada_norm=11, **(sizes | settings))


# -- adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_has_no_effect_and_a_trained_one_is_its_own(dora: bool, dtype: torch.dtype) -> None:
    pipeline = tiny_unet2d()
    pipeline.unet.to(dtype)
    teacher = Teacher(pipeline)
    x, t, condition = torch.randn(2, *teacher.sample_shape), torch.tensor(0.6), teacher.condition([3, 7])
    before = teacher.denoiser(x, t, condition)
    roles, adapters = build_roles(teacher, ["student", "critic"], LoRA(rank=2, alpha=3, dora=dora))
    assert adapters is not None and roles.critic is not None
    assert torch.equal(roles.student(x, t, condition), before) and torch.equal(roles.critic(x, t, condition), before)
    assert all(p.dtype == torch.float32 for p in roles.parameters("student"))
    named = roles.named_parameters("student")
    assert len(named) == (3 if dora else 2) * len(adapters.targets)
    assert sum(n.endswith("lora_magnitude_vector.weight") for n in named) == (len(adapters.targets) if dora else 0)
    perturb([p for n, p in named.items() if "magnitude" in n or not dora], 0.2)
    assert (roles.student(x, t, condition) - before).abs().max() > 1e-3
    assert torch.equal(roles.critic(x, t, condition), before) and torch.equal(teacher.denoiser(x, t, condition), before)


def test_dora_is_the_formula_of_its_paper() -> None:
    """y = m (W + s B A) x / ‖W + s B A‖ by row, on one linear layer."""
    teacher, x, t, condition = fresh_teacher()
    roles, adapters = build_roles(teacher, ["student"], LoRA(rank=2, alpha=3, targets=("to_q",), dora=True))
    assert adapters is not None
    perturb(roles.parameters("student"), 0.3)
    layer, named = adapters.layers[0], adapters.named_parameters("student")
    a, b, m = (named[f"{adapters.targets[0]}.{n}.weight"] for n in ("lora_A", "lora_B", "lora_magnitude_vector"))
    w, inputs = layer.get_base_layer().weight + 1.5 * b @ a, torch.randn(4, a.shape[1])
    with adapters.using("student"):
        torch.testing.assert_close(layer(inputs), inputs @ (m[:, None] * w / w.norm(dim=1, keepdim=True)).T + layer.get_base_layer().bias)
    assert adapters.active is None


def test_dora_leaves_out_layers_with_rows_of_zeros() -> None:
    backbone = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])})
    torch.nn.init.zeros_(backbone.get_parameter("blocks.1.weight")[2])
    assert Adapters(backbone, LoRA(2, 2, dora=True), ["student"]).targets == ["blocks.0"]
    backbone = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    assert Adapters(backbone, LoRA(2, 2), ["student"]).targets == ["blocks.0"]


def test_adapters_go_into_the_blocks_of_any_backbone() -> None:
    dit = transformer()
    targets = lora_targets(dit, None)
    assert all(name.startswith("transformer_blocks.") for name in targets)
    linear = [n for n, m in dit.named_modules() if isinstance(m, torch.nn.Linear)]
    assert set(targets) == {n for n in linear if n.startswith("transformer_blocks.")} and len(targets) < len(linear)
    unet = unet2d()
    chosen = lora_targets(unet, None)
    assert all(n.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for n in chosen)
    assert {"down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_q"} <= set(chosen) and not any(n.startswith(("time_", "conv_")) for n in chosen)
    grouped = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 4, 1)])})
    assert lora_targets(grouped, None) == ["blocks.1"]  # an adapter on a grouped convolution cannot be merged
    assert inside_a_block("transformer_blocks.3.attn.to_q") and not inside_a_block("time_text_embed.timestep_embedder.linear_1")


# -- selected layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "fits"),
    [
        (Selection(("mid_block",)), lambda n: n.startswith("mid_block.")),
        (Selection(("*.attentions",)), lambda n: ".attentions." in n),
        (Selection(("up_blocks.*.bias",)), lambda n: n.startswith("up_blocks.") and n.endswith(".bias")),
        (Selection((r"re:resnets\.0\.conv[12]\.",)), lambda n: "resnets.0.conv1." in n or "resnets.0.conv2." in n),
        (Selection(freeze=("down_blocks", "conv_in")), lambda n: not n.startswith(("down_blocks.", "conv_in."))),
        (Selection(("mid_block", "conv_out"), ("*.bias",)), lambda n: n.startswith(("mid_block.", "conv_out.")) and not n.endswith(".bias")),
    ],
)
def test_patterns(selection: Selection, fits: Any) -> None:
    backbone = unet2d()
    expected = [n for n, _ in backbone.named_parameters() if fits(n)]
    assert selection.names(backbone) == expected and 0 < len(expected) < len(list(backbone.parameters()))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(("mid_blok",)), "student.train: no parameter of UNet2DModel fits 'mid_blok'; did you mean mid_block"),
        (Selection(freeze=("*.atentions",)), "student.freeze: .*did you mean .*attentions"),
        (Selection(("qqq",)), "it has conv_in, time_proj"),
        (Selection(("re:(",)), "is not a regular expression"),
        (Selection(("mid_block",), ("*",)), "nothing of UNet2DModel is left to train"),
    ],
)
def test_patterns_that_fit_nothing_are_refused(selection: Selection, message: str) -> None:
    with pytest.raises(UserError, match=message):
        selection.names(unet2d())


def test_frozen_layers_are_the_teachers_own_memory() -> None:
    backbone = unet2d()
    backbone.register_buffer("grid", torch.zeros(3))
    trained = Selection(("mid_block",)).names(backbone)
    made = shared_copy(backbone, trained)
    theirs, ours = dict(backbone.named_parameters()), dict(made.named_parameters())
    assert list(theirs) == list(ours)
    assert {n for n in ours if ours[n].data_ptr() != theirs[n].data_ptr()} == set(trained)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours) and made.get_buffer("grid").data_ptr() == backbone.get_buffer("grid").data_ptr()


def storages(roles: Roles) -> int:
    networks = [n for n in (roles.teacher, roles.student, roles.critic, roles.target) if n is not None]
    tensors = {p.data_ptr(): p.numel() for n in networks for p in n.backbone.parameters()}  # type: ignore[attr-defined]
    return sum(tensors.values())


def test_roles_of_selected_layers_share_the_rest() -> None:
    teacher, x, t, condition = fresh_teacher()
    whole = sum(p.numel() for p in teacher.backbone.parameters())
    roles, _ = build_roles(teacher, ["student", "critic", "target"], selection=Selection(("conv_out", "conv_in")))
    part = sum(p.numel() for p in roles.parameters("student"))
    assert part == sum(p.numel() for n, p in teacher.backbone.named_parameters() if n.startswith(("conv_out", "conv_in")))
    assert storages(roles) == whole + 3 * part and roles.critic is not None
    before = teacher.denoiser(x, t, condition)
    assert torch.equal(roles.student(x, t, condition), before)
    roles.student(x, t, condition).square().mean().backward()
    assert all(p.grad is not None for p in roles.parameters("student")) and not any(p.requires_grad for p in teacher.backbone.parameters())
    perturb(roles.parameters("student"))
    assert torch.equal(teacher.denoiser(x, t, condition), before) and torch.equal(roles.critic(x, t, condition), before)
    assert (roles.student(x, t, condition) - before).abs().max() > 1e-3


def test_selected_layers_with_a_guidance_embedding() -> None:
    teacher = Teacher(tiny_stable_diffusion())
    roles, _ = build_roles(teacher, ["student"], guidance_embedding=32, selection=Selection(("mid_block",)))
    names = list(roles.named_parameters("student"))
    assert "time_embedding.cond_proj.weight" in names and all(n.startswith(("mid_block.", "time_embedding.cond_proj")) for n in names)
    ours, theirs = roles.student.backbone.get_parameter("conv_in.weight"), teacher.backbone.get_parameter("conv_in.weight")  # type: ignore[attr-defined]
    assert ours.data_ptr() == theirs.data_ptr()


# -- smaller students ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [unet2d, transformer])
def test_the_same_architecture_is_an_exact_copy(make: Any) -> None:
    teacher = make()
    student = shrunk(teacher, {"sample_size": 8})
    assert type(student) is type(teacher) and not student.training
    theirs = teacher.state_dict()
    assert list(student.state_dict()) == list(theirs)
    for name, value in student.state_dict().items():
        assert torch.equal(value, theirs[name]) and value.data_ptr() != theirs[name].data_ptr()


def test_kept_blocks_are_spread_evenly() -> None:
    assert [kept_block(i, 3, 5) for i in range(3)] == [0, 2, 4]
    assert [kept_block(i, 6, 24) for i in range(6)] == [0, 5, 9, 14, 18, 23]
    assert [kept_block(i, 4, 5) for i in range(4)] == [0, 1, 3, 4]
    assert [kept_block(i, 5, 5) for i in range(5)] == [0, 1, 2, 3, 4] and kept_block(0, 1, 5) == 0
    for of in range(1, 40):
        for blocks in range(2, of + 1):
            kept = [kept_block(i, blocks, of) for i in range(blocks)]
            assert kept[0] == 0 and kept[-1] == of - 1 and len(set(kept)) == blocks


def test_fewer_layers_keep_the_chosen_ones() -> None:
    teacher = transformer(layers=5)
    student = shrunk(teacher, {"num_layers": 3})
    blocks, theirs = student.get_submodule("transformer_blocks"), teacher.transformer_blocks
    assert len(list(blocks.children())) == 3 and student.config["num_layers"] == 3  # type: ignore[index]
    for ours, index in zip(blocks.children(), (0, 2, 4), strict=True):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs[index].state_dict()[name])
    assert torch.equal(student.get_parameter("proj_out_2.weight"), teacher.proj_out_2.weight)


def test_fewer_resnets_inside_the_blocks() -> None:
    def make(layers: int) -> UNet2DConditionModel:
        torch.manual_seed(1)
        return UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=layers, cross_attention_dim=8, norm_num_groups=4,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )

    teacher, student = make(3), shrunk(make(3), {"layers_per_block": 2})
    name = "up_blocks.1.resnets.2.conv1.weight"  # 3 of them out of 4: blocks 0, 2, 3
    assert source_of(name, student, teacher) == "up_blocks.1.resnets.3.conv1.weight"
    assert torch.equal(student.get_parameter(name), teacher.get_parameter("up_blocks.1.resnets.3.conv1.weight"))
    assert torch.equal(student.get_parameter("down_blocks.0.attentions.1.proj_in.weight"), teacher.get_parameter("down_blocks.0.attentions.2.proj_in.weight"))


def test_half_of_the_channels_are_the_leading_ones() -> None:
    teacher = unet2d()
    student = shrunk(teacher, {"block_out_channels": [4, 8]})
    theirs = dict(teacher.named_parameters())
    for name, value in student.named_parameters():
        assert torch.equal(value, theirs[name][tuple(slice(n) for n in value.shape)]), name
    assert student.get_parameter("mid_block.resnets.0.conv1.weight").shape == (8, 8, 3, 3)
    assert sum(p.numel() for p in student.parameters()) < 0.3 * sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layer": 2}, "has no setting 'num_layer'; did you mean 'num_layers'"),
        ({"num_layers": 6}, "transformer_blocks would have 6 blocks, and the teacher has 5"),
        ({"num_attention_heads": 4}, "would grow"),
        ({"num_layers": "many"}, "cannot be built so"),
        ({"norm_type": "layer_norm"}, "cannot be built so|no counterpart"),
    ],
)
def test_impossible_architectures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        shrunk(transformer(), changes)
    assert str(caught.value).startswith("student.architecture: ")


def test_a_smaller_student_keeps_the_critic_and_is_exported(tmp_path: Path) -> None:
    teacher, x, t, condition = fresh_teacher()
    roles, _ = build_roles(teacher, ["student", "critic", "target"], architecture={"block_out_channels": [4, 8]})
    assert roles.critic is not None and roles.target is not None
    sizes = {r: sum(p.numel() for p in roles.parameters(r)) for r in ("student", "critic", "target")}
    assert sizes["student"] == sizes["target"] < 0.3 * sizes["critic"] and sizes["critic"] == sum(p.numel() for p in teacher.backbone.parameters())
    assert roles.student(x, t, condition).shape == x.shape
    perturb(roles.parameters("student"))
    student = Student(teacher, roles.student, Sampler(uniform_ladder(2), 2))  # type: ignore[arg-type]
    export_diffusers(student, tmp_path / "student", **FACTS)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.config.block_out_channels == [4, 8]
    images = loaded([3, 7], generator=torch.Generator().manual_seed(2), output_type="pt").images
    assert (images - student.images([3, 7], generator=torch.Generator().manual_seed(2))).abs().max() <= 1e-4


# -- one step of each method --------------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "full": {}, "lora": {"lora": LoRA(2, 2)}, "dora": {"lora": LoRA(2, 2, dora=True)}, "selected": {"selection": Selection(("mid_block", "*.bias"))},
    "smaller": {"architecture": {"block_out_channels": [4, 8]}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [DMD2(critic_steps=1), Consistency(discretization=(4, 4), steps=2)])
def test_a_step_changes_the_trained_roles_alone(method: Method, kind: str) -> None:
    teacher, x, _, condition = fresh_teacher()
    roles, _ = build_roles(teacher, method.roles, **KINDS[kind])
    for seed, role in enumerate(roles.trained()):  # equal networks would have nothing to learn from each other
        perturb(roles.parameters(role), seed=seed)
    everything = {id(p): p for r in (roles.teacher, roles.student, roles.critic, roles.target) if r is not None for p in r.backbone.parameters()}  # type: ignore[attr-defined]
    before = {key: p.detach().clone() for key, p in everything.items()}
    optimizers = {r: torch.optim.Adam(roles.parameters(r), 1e-3) for r in roles.trained()}
    assert list(optimizers) == [r for r in ("student", "critic") if r in method.roles]
    updated = []
    for role, loss, _ in method.step(roles, Batch(torch.randn_like(x), condition, x)):
        assert isinstance(role, str)
        for p in everything.values():
            p.grad = None
        loss.backward(inputs=roles.parameters(role))
        optimizers[role].step()
        updated.append(role)
    assert updated == list(optimizers)
    trained = {id(p) for r in optimizers for p in roles.parameters(r)}
    changed = {key for key, p in everything.items() if not torch.equal(p, before[key])}
    assert changed <= trained
    for role, optimizer in optimizers.items():
        own = {id(p) for p in roles.parameters(role)}
        assert {id(p) for p in optimizer.state} <= own and len(changed & own) >= 0.95 * len(own)
