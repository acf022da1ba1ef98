"""Export: stock diffusers makes the same images from what was written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_stable_diffusion, tiny_student, tiny_unet2d, unet2d

from distill.errors import UserError
from distill.export import call_guidance, export_diffusers, export_lora, read_facts
from distill.loading import load_pipeline
from distill.resources import resource
from distill.roles import LoRA
from distill.sampling import Sampler
from distill.student import Student

FACTS: dict[str, Any] = {"method": "dmd2", "teacher_name": "owner/teacher"}


make = tiny_student


def difference(student: Student, pipeline: Any, inputs: list[Any], name: str | None, steps: int) -> float:
    guidance = call_guidance(student.sampler)
    ours = student.images(inputs, steps=steps, generator=torch.Generator().manual_seed(9), guidance_scale=guidance)
    call = {"batch_size": len(inputs)} if name is None else {name: inputs}
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(**call, num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(9), output_type="np").images
    assert ours.std() > 0.01
    return float((torch.from_numpy(theirs).permute(0, 3, 1, 2) - ours).abs().max())


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)])
@pytest.mark.parametrize(("prediction_type", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_stable_diffusion_students_are_stock_pipelines(tmp_path: Path, prediction_type: str, zero_snr: bool, lora: LoRA | None) -> None:
    student = make(tiny_stable_diffusion(prediction_type, zero_snr), lora=lora)
    export_diffusers(student, tmp_path / "student", **FACTS)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(pipeline) is StableDiffusionPipeline and type(pipeline.scheduler) is LCMScheduler
    assert not any(tmp_path.rglob("*.bin"))
    for steps in (1, 2, 4):
        assert difference(student, pipeline, ["a red apple", "a blue car"], "prompt", steps) <= 1e-4
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 7, 8])
def test_every_length_of_the_ladder_can_be_exported(tmp_path: Path, steps: int) -> None:
    student = make(tiny_unet2d(), steps=steps)
    export_diffusers(student, tmp_path / "student", **FACTS)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert difference(student, pipeline, [1, 2, 3], "class_labels", steps) <= 1e-4


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=6)])
def test_pixel_students_need_no_arguments(tmp_path: Path, lora: LoRA | None) -> None:
    student = make(tiny_unet2d(), lora=lora)
    export_diffusers(student, tmp_path / "student", **FACTS)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3, 7], generator=torch.Generator().manual_seed(2), output_type="pt").images
    ours = student.images([3, 7], generator=torch.Generator().manual_seed(2))
    assert (images - ours).abs().max() <= 1e-4
    assert type(pipeline).__module__.startswith("diffusers_modules")  # the copy in the folder, not ours


def test_unconditional_students(tmp_path: Path) -> None:
    pipeline = DDIMPipeline(unet2d(None), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    student = make(pipeline, steps=2)
    export_diffusers(student, tmp_path / "student", **FACTS)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert difference(student, loaded, [None] * 2, None, 2) <= 1e-4


def test_guidance_embedding_survives(tmp_path: Path) -> None:
    student = make(tiny_stable_diffusion(), guidance_range=(2.0, 8.0))
    export_diffusers(student, tmp_path / "student", **FACTS)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert pipeline.unet.config.time_cond_proj_dim == 32
    assert difference(student, pipeline, ["a cat"], "prompt", 4) <= 1e-4
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "output_type": "np"}
    low, high = (pipeline("a cat", guidance_scale=w, generator=torch.Generator().manual_seed(0), **call).images for w in (2.0, 8.0))
    assert abs(low - high).max() > 1e-4


@pytest.mark.parametrize("settings", [LoRA(rank=4, alpha=4), LoRA(rank=4, alpha=1), LoRA(rank=4, alpha=16, targets=("to_q", "to_k", "conv1"))])
def test_stable_diffusion_lora_loads_at_scale_one(tmp_path: Path, settings: LoRA) -> None:
    student = make(tiny_stable_diffusion(), lora=settings)
    export_lora(student, tmp_path / "lora", **FACTS)
    pipeline = tiny_stable_diffusion()  # a fresh teacher
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = LCMScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    for steps in (1, 4):
        assert difference(student, pipeline, ["a red apple"], "prompt", steps) <= 1e-4
    pipeline.unload_lora_weights()
    assert difference(student, pipeline, ["a red apple"], "prompt", 1) > 1e-3


def test_pixel_lora_loads_onto_its_teacher(tmp_path: Path) -> None:
    student = make(tiny_unet2d(), lora=LoRA(rank=3, alpha=12))
    export_lora(student, tmp_path / "lora", **FACTS)
    pipeline = tiny_unet2d()
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = LCMScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    assert difference(student, pipeline, [1, 5], "class_labels", 4) <= 1e-4
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, path)
    with pytest.raises(ValueError, match="does not fit"):
        tiny_unet2d().load_lora_weights(tmp_path / "lora")


def test_the_student_itself_is_left_as_it_was(tmp_path: Path) -> None:
    student = make(tiny_unet2d(), lora=LoRA(rank=2, alpha=2))
    before = student.images([4], generator=torch.Generator().manual_seed(0))
    teacher_before = student.teacher.denoiser(torch.ones(1, 1, 8, 8), torch.tensor(0.5), student.teacher.condition([4]))
    export_diffusers(student, tmp_path / "student", **FACTS)
    export_lora(student, tmp_path / "lora", **FACTS)
    assert torch.equal(student.images([4], generator=torch.Generator().manual_seed(0)), before)
    assert torch.equal(student.teacher.denoiser(torch.ones(1, 1, 8, 8), torch.tensor(0.5), student.teacher.condition([4])), teacher_before)


def test_what_cannot_be_reproduced_is_not_written(tmp_path: Path) -> None:
    student = make(tiny_unet2d())
    student.sampler = Sampler((1.0, 0.9, 0.2), 3)
    with pytest.raises(UserError, match="no stock scheduler samples this student at its times 1, 0.9, 0.2"):
        export_diffusers(student, tmp_path / "student", **FACTS)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_in_the_images_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make(tiny_unet2d())
    monkeypatch.setattr("distill.export.assembly.merged", lambda s: unet2d(seed=7))
    with pytest.raises(UserError, match="differs from the student"):
        export_diffusers(student, tmp_path / "student", **FACTS)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    student = make(tiny_unet2d(), steps=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not an export"):
        export_diffusers(student, tmp_path / "mine", overwrite=True, **FACTS)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    export_diffusers(student, tmp_path / "student", **FACTS)
    with pytest.raises(UserError, match="exists already"):
        export_diffusers(student, tmp_path / "student", **FACTS)
    export_diffusers(student, tmp_path / "student", overwrite=True, **FACTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        export_diffusers(student, tmp_path / "file" / "student", **FACTS)
    with pytest.raises(UserError, match="full weights cannot be exported as a LoRA"):
        export_lora(student, tmp_path / "lora", **FACTS)


def test_facts_and_card(tmp_path: Path) -> None:
    student = make(tiny_stable_diffusion(), guidance_scale=7.5)
    rows = [{"name": "teacher", "steps": 50, "fid": 12.3}, {"name": "student", "steps": 4, "fid": 14.5}]
    export_diffusers(student, tmp_path / "student", metrics=rows, **FACTS)
    facts = read_facts(tmp_path / "student")
    assert facts is not None and facts["sampler"] == student.sampler and facts["guidance_scale"] == 1.0
    card = (tmp_path / "student" / "README.md").read_text()
    header = ("base_model: owner/teacher", "library_name: diffusers", "pipeline_tag: text-to-image")
    for expected in (*header, "guidance_scale=1", "7.5, folded", "num_inference_steps=4", "| teacher | 50 | 12.30 |"):
        assert expected in card, expected
    (tmp_path / "student" / "distill.json").write_text(json.dumps({"sampler": {"wrong": 1}}))
    with pytest.raises(UserError, match="damaged"):
        read_facts(tmp_path / "student")
    assert read_facts(tmp_path) is None


def test_the_shipped_teacher_carries_the_current_pipeline_file() -> None:
    """assets/digits-teacher is loadable by plain diffusers: its copy of the file is the one that the toolkit ships."""
    folder = resource("assets/digits-teacher")
    assert (folder / "unet2d.py").read_bytes() == resource("pipelines/unet2d.py").read_bytes()
    pipeline = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    ours = load_pipeline("assets/digits-teacher")([0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert (images - ours).abs().max() <= 1e-6
