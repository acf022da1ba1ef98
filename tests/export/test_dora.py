"""DoRA: the rows' magnitudes travel with the adapter, in every form of it. Each export compares images or weights itself."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_dit, tiny_stable_diffusion, tiny_student

from distill.export import export_diffusers, export_lora
from distill.roles import LoRA

FACTS: dict[str, Any] = {"method": "dmd2", "teacher_name": "owner/teacher"}


@pytest.fixture(autouse=True)
def magnitudes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter is a DoRA."""
    config = peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **settings: config(**(settings | {"use_dora": True})))


def test_dora_travels(tmp_path: Path) -> None:
    student = tiny_student(tiny_stable_diffusion(), steps=1, lora=LoRA(rank=4, alpha=8, targets=("to_q", "proj_in", "conv1")))
    names = [n for n in student.denoiser.named_parameters() if "magnitude" in n]
    assert names
    export_lora(student, tmp_path / "lora", **FACTS)
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert sum(k.endswith("lora_magnitude_vector") for k in weights) == len(names)
    pipeline = tiny_stable_diffusion()
    pipeline.load_lora_weights(tmp_path / "lora")
    images = pipeline("a cat", num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(3), output_type="np").images
    ours = student.images(["a cat"], steps=1, generator=torch.Generator().manual_seed(3))
    assert images.shape == (1, 16, 16, 3) and ours.std() > 0.01  # images of the adapted teacher; equality is the export's own proof
    export_lora(student, tmp_path / "kohya", names="kohya", **FACTS)
    stored = load_file(tmp_path / "kohya" / "pytorch_lora_weights.safetensors")
    assert sum(k.endswith("dora_scale") for k in stored) == len(names)
    scale = next(v for k, v in stored.items() if k.endswith("to_q.dora_scale"))
    assert scale.dim() == 2 and scale.shape[1] == 1
    export_diffusers(student, tmp_path / "student", **FACTS)  # merged


def test_dora_for_peft(tmp_path: Path) -> None:
    student = tiny_student(tiny_dit(), steps=1, lora=LoRA(rank=4, alpha=8, targets=("to_q", "to_v")))
    export_lora(student, tmp_path / "lora", **FACTS)
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any(k.endswith("lora_magnitude_vector") for k in weights)
