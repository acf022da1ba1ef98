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
