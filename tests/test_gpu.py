"""On a CUDA device: mixed precision, compilation, and the same numbers as on the CPU."""

from pathlib import Path

import pytest
import torch

from distill.config import load_config
from distill.logs import read_metrics
from distill.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("extra", [[], ["trainer.mixed_precision=bf16"], ["trainer.mixed_precision=fp16"], ["trainer.compile=true"]])
def test_quickstart_trains(tmp_path: Path, extra: list[str]) -> None:
    config = load_config("quickstart", ["trainer.steps=20", "trainer.log_every=1", "trainer.device=cuda", f"output.folder={tmp_path}", *extra])
    Trainer(config, tmp_path).fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 20 and all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


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
