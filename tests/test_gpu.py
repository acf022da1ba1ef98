"""On a CUDA device: mixed precision, compilation, the memory options, and the same numbers as on the CPU."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from tiny import tiny_stable_diffusion

from distill.attention import check_xformers, use_attention
from distill.config import load_config
from distill.logs import read_metrics
from distill.memory import checkpoint_activations
from distill.quantize import quantize
from distill.running import exact
from distill.teacher import Teacher
from distill.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("extra", [
    [], ["trainer.mixed_precision=bf16"], ["trainer.mixed_precision=fp16"], ["trainer.compile=true"], ["teacher.dtype=bfloat16"], ["teacher.dtype=float16"],
])
def test_quickstart_trains(tmp_path: Path, extra: list[str]) -> None:
    config = load_config("quickstart", ["trainer.steps=20", "trainer.log_every=1", "trainer.device=cuda", f"output.folder={tmp_path}", *extra])
    Trainer(config, tmp_path).fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 20 and all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


@exact()  # cuDNN's TF32 has 10 bits
def test_teacher_agrees_with_the_cpu() -> None:
    from distill.run import load_teacher

    config = load_config("quickstart")
    outputs = []
    for device in ("cpu", "cuda"):
        teacher = load_teacher(config, device)
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        outputs.append(teacher.denoiser(x, torch.tensor(0.5), teacher.condition([0, 1, 2, 3])).cpu())
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)


SDXL_RECIPE = """
teacher: {{pipeline: {folder}/sdxl, dtype: bfloat16}}
student: {{weights: lora, lora: {{rank: 64}}}}
method: {{name: dmd2, guidance_scale: 8.0}}
data: {{source: prompts, path: {folder}/prompts.txt}}
trainer: {{batch_size: 1, gradient_checkpointing: true}}
output: {{folder: {folder}/run}}
"""


@pytest.mark.slow
def test_sdxl_lora_step_below_22_gib(tmp_path: Path) -> None:
    """DMD2 with adapters on one SDXL-sized backbone at 1024², as in docs/plan.md, with made-up weights: the plan and a real step."""
    import pipeline_configs
    from test_plan import measured

    pipeline_configs.write_sdxl(tmp_path / "sdxl")
    (tmp_path / "prompts.txt").write_text("a photograph\n")
    (tmp_path / "recipe.yaml").write_text(SDXL_RECIPE.format(folder=tmp_path))
    found = measured(tmp_path / "recipe.yaml", [], "cuda")
    assert max(found["planned"], found["measured"]) < 22 * 2**30
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)


@pytest.mark.slow
def test_sd3_step_is_planned_within_15_percent(tmp_path: Path) -> None:
    """The same on an SD3-sized transformer."""
    import pipeline_configs
    from test_plan import measured

    pipeline_configs.write_sd3(tmp_path / "sdxl")
    (tmp_path / "prompts.txt").write_text("a photograph\n")
    (tmp_path / "recipe.yaml").write_text(SDXL_RECIPE.format(folder=tmp_path))
    found = measured(tmp_path / "recipe.yaml", ["method.guidance_scale=5.0"], "cuda")
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)


def missing(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@pytest.mark.parametrize(
    "extra",
    [
        ["trainer.gradient_checkpointing=true", "trainer.offload=true"],
        ["trainer.mixed_precision=bf16", "trainer.attention=flash", "trainer.gradient_checkpointing=true"],
        ["student={ema_device: cpu, ema_dtype: bfloat16, train: [mid_block, up_blocks]}", "trainer.offload=true"],
        ["student={weights: lora, lora: {rank: 4, dora: true}}", "trainer.gradient_checkpointing=true", "trainer.mixed_precision=bf16"],
        ["student.architecture={block_out_channels: [16, 24]}"],
        ["student={weights: lora, lora: {rank: 4}}", "trainer.batched_roles=true", "method={name: dmd2, guidance_scale: 3.0}"],
        pytest.param(["teacher.quantize=int8", "student={weights: lora}"], marks=missing("torchao")),
        pytest.param(["teacher.quantize=8bit"], marks=missing("bitsandbytes")),
        pytest.param(["teacher.quantize=4bit", "student={weights: lora}", "trainer.gradient_checkpointing=true"], marks=missing("bitsandbytes")),
        pytest.param(["optimizers.student.name=adamw8bit"], marks=missing("bitsandbytes")),
        pytest.param(["trainer.attention=xformers", "trainer.mixed_precision=fp16"], marks=missing("xformers")),
    ],
)
def test_students_and_memory_options_train(tmp_path: Path, extra: list[str]) -> None:
    config = load_config("quickstart", ["trainer.steps=10", "trainer.log_every=1", "trainer.device=cuda", f"output.folder={tmp_path}", *extra])
    Trainer(config, tmp_path).fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 10 and all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


def test_offload_and_checkpointing_change_no_loss(tmp_path: Path) -> None:
    logged = []
    for name, extra in (("plain", []), ("saving", ["trainer.gradient_checkpointing=true", "trainer.offload=true"])):
        folder = tmp_path / name
        folder.mkdir()
        settings = ["trainer.steps=5", "trainer.log_every=1", "trainer.device=cuda", "trainer.batch_size=16", f"output.folder={folder}"]
        Trainer(load_config("quickstart", [*settings, *extra]), folder).fit()
        logged.append(read_metrics(folder / "metrics.jsonl"))
    for a, b in zip(*logged, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=1e-2, abs=1e-4) for k in a)


def test_an_idle_teacher_is_not_on_the_device(tmp_path: Path) -> None:
    config = load_config("quickstart", ["trainer.device=cuda", "trainer.offload=true", "trainer.batch_size=4", f"output.folder={tmp_path}"])
    trainer = Trainer(config, tmp_path)
    first, *others = trainer.parts.teacher.backbone.parameters()
    assert first.is_cuda and not any(p.is_cuda for p in others)
    trainer.step(0)
    assert not any(p.is_cuda for p in others) and all(p.is_cuda for p in trainer.parameters["student"])
    assert trainer.parts.waiting[0].homes[0].is_pinned()


def test_checkpointing_lowers_the_peak() -> None:
    peaks = []
    for checkpointed in (False, True):
        backbone = UNet2DConditionModel(
            sample_size=64, block_out_channels=(64, 128), layers_per_block=4, cross_attention_dim=64, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).cuda()
        if checkpointed:
            checkpoint_activations(backbone)
        torch.cuda.reset_peak_memory_stats()
        backbone(torch.randn(4, 4, 64, 64, device="cuda"), 5, torch.randn(4, 8, 64, device="cuda")).sample.square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del backbone
        torch.cuda.empty_cache()
    assert peaks[1] < 0.6 * peaks[0]


@missing("bitsandbytes")
@pytest.mark.parametrize(("bits", "share"), [("8bit", 0.65), ("4bit", 0.45)])
def test_a_quantised_teacher_takes_less_memory(bits: Any, share: float) -> None:
    torch.manual_seed(0)
    backbone = DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=64, in_channels=4, num_layers=8, sample_size=16).to(torch.bfloat16)
    whole = sum(p.numel() * p.element_size() for p in backbone.parameters())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    quantize(backbone, bits, "cuda")
    assert torch.cuda.memory_allocated() - before < share * whole


@missing("xformers")
def test_xformers_gives_the_same_attention() -> None:
    check_xformers(torch.device("cuda"))
    teacher = Teacher(tiny_stable_diffusion().to("cuda"))
    x, t, condition = torch.randn(2, *teacher.sample_shape, device="cuda"), torch.tensor(0.5), teacher.condition(["a cat"] * 2)
    before = teacher.denoiser(x, t, condition)
    use_attention(teacher.backbone, "xformers", torch.device("cuda"))
    torch.testing.assert_close(teacher.denoiser(x, t, condition), before, atol=1e-3, rtol=1e-3)


def test_text_encoders_are_off_the_device_during_training() -> None:
    pipeline = tiny_stable_diffusion().to("cuda")
    teacher = Teacher(pipeline)
    before = teacher.condition(["a cat", "a car"])
    teacher.rest_encoders()
    assert next(pipeline.text_encoder.parameters()).device.type == "cpu" and next(pipeline.unet.parameters()).device.type == "cuda"
    after = teacher.condition(["a cat", "a car"])
    torch.testing.assert_close(after.values["encoder_hidden_states"], before.values["encoder_hidden_states"])
    assert next(pipeline.text_encoder.parameters()).device.type == "cpu"
