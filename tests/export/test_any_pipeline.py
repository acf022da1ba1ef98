"""Exports of pipelines that do something of their own: cascades, values set after construction, classes that diffusers does not find again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_stable_diffusion, tiny_student
from zoo import CASES

from distill.export import assembly, export_diffusers, export_few_step, load_export, proof
from distill.export.files import set_attributes
from distill.teacher import Teacher

FACTS: dict[str, Any] = {"method": "dmd2", "teacher_name": "owner/teacher"}


def student_of(name: str, steps: int = 2) -> Any:
    return tiny_student(CASES[name].build(), steps=steps, call=CASES[name].call())


def test_values_set_after_construction_travel() -> None:
    """Only what is plain, was set, and is not set again by the constructor."""
    pipeline = CASES["Kandinsky5T2IPipeline"].build()
    assert assembly.attributes(pipeline) == {"resolutions": [(64, 64)]}
    pipeline.image_processor_of_mine, pipeline._hidden = 3, 4
    made = assembly.remake(type(pipeline), pipeline, pipeline.components)
    assert made.resolutions == [(64, 64)] and not hasattr(made, "image_processor_of_mine")
    assert assembly.attributes(tiny_stable_diffusion()) == {}


def test_an_export_says_what_was_set(tmp_path: Path) -> None:
    """Flux 2's system message belongs to the prompt: without it the images differ, and the export would be refused."""
    student = student_of("Flux2Pipeline", steps=1)
    export_diffusers(student, tmp_path / "student", **FACTS)
    assert json.loads((tmp_path / "student" / "distill.json").read_text())["attributes"] == {"system_message": "'draw'"}
    assert "pipe.system_message = 'draw'\n" in (tmp_path / "student" / "README.md").read_text()
    assert load_export(tmp_path / "student").system_message == "draw"
    few = DiffusionPipeline.from_pretrained(tmp_path / "student", custom_pipeline="pipeline", trust_remote_code=True)
    assert few.system_message == "draw"
    assert DiffusionPipeline.from_pretrained(tmp_path / "student").system_message != "draw"


def test_no_code_is_run_to_set_values() -> None:
    from distill.errors import UserError

    pipeline = tiny_stable_diffusion()
    with pytest.raises(UserError, match="damaged"):
        set_attributes(pipeline, {"attributes": {"vae_scale_factor": "__import__('os').getcwd()"}})
    set_attributes(pipeline, {"attributes": {"unknown": "3", "vae_scale_factor": "7"}})
    assert pipeline.vae_scale_factor == 7 and not hasattr(pipeline, "unknown")


def test_a_cascade_samples_with_its_last_stages_scheduler(tmp_path: Path) -> None:
    """The stages are pipelines of their own, made of the same parts: they have to get the student's scheduler too."""
    student = student_of("KandinskyV22CombinedPipeline")
    assert student.teacher.scheduler_name == "scheduler"
    export_few_step(student, tmp_path / "student", **FACTS)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert loaded.decoder_pipe.scheduler is loaded.scheduler and type(loaded.scheduler).__name__ == "FewStepScheduler"
    assert type(loaded.prior_pipe.scheduler).__name__ == "UnCLIPScheduler"


def test_a_scheduler_of_another_name(tmp_path: Path) -> None:
    student = student_of("UnCLIPPipeline")
    assert (student.teacher.scheduler_name, student.teacher.steps_name) == ("decoder_scheduler", "decoder_num_inference_steps")
    export_few_step(student, tmp_path / "student", **FACTS)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert type(loaded.decoder_scheduler).__name__ == "FewStepScheduler" and type(loaded.super_res_scheduler).__name__ == "UnCLIPScheduler"


def test_classes_that_diffusers_does_not_find_again(tmp_path: Path) -> None:
    """Würstchen's are named by their module; AltDiffusion's text encoder by a file of one line."""
    student = student_of("WuerstchenCombinedPipeline", steps=1)
    assert student.teacher.spare_timesteps == 1
    export_few_step(student, tmp_path / "a", **FACTS)
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["decoder"] == ["diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext", "WuerstchenDiffNeXt"]
    assert not list((tmp_path / "a").glob("*/*.py"))
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True).decoder).__name__ == "WuerstchenDiffNeXt"
    export_diffusers(student_of("AltDiffusionPipeline", steps=1), tmp_path / "b", **FACTS)
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["text_encoder"] == ["modeling_roberta_series", "RobertaSeriesModelWithTransformation"]
    assert "trust_remote_code=True" in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(ValueError, match="trust_remote_code|not been imported"):
        DiffusionPipeline.from_pretrained(tmp_path / "b")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "b", trust_remote_code=True)
    assert type(loaded.text_encoder).__module__ == "diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series"


def test_decoders_that_answer_in_zero_to_one() -> None:
    """Würstchen's pipeline clamps what its decoder says to [0, 1]; most map it there from [−1, 1]."""
    for name, expected in (("WuerstchenCombinedPipeline", (1.0, 0.0)), ("StableDiffusionPipeline", (0.5, 0.5))):
        teacher = Teacher(CASES[name].build(), CASES[name].call())
        assert teacher.autoencoder is not None
        assert (teacher.autoencoder.image_scale, teacher.autoencoder.image_shift) == expected
        x0 = torch.randn(1, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
        raw = teacher.autoencoder.module.decode(teacher.autoencoder.scale[0] * x0 if name[0] == "W" else x0 / 0.18215).sample
        assert torch.allclose(teacher.decode(x0), (expected[0] * raw + expected[1]).clamp(0, 1), atol=1e-5)


def test_rounding_before_a_codebook_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the samples agree to rounding, the images are compared with those of the pipeline's own sample; where not, they are not."""
    student = student_of("StableDiffusionPipeline", steps=1)
    x0 = torch.randn(1, *student.teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(student.teacher, "decode", lambda x: (x * 1e6).sin())  # a decoder that jumps
    for change, allowed in ((1e-7, True), (1e-3, False)):
        theirs = x0 * (1 + change)
        trace = proof.Trace(final=theirs)
        difference = proof._difference(student, student.teacher.decode(theirs), x0, trace)
        assert (difference <= 1e-6) is allowed
    assert proof._difference(student, student.teacher.decode(x0) + 0.5, x0, proof.Trace(final=x0)) == pytest.approx(0.5)


def test_a_teacher_that_always_doubles_its_batch_hears_its_prompt() -> None:
    """DreamLite computes u + w (c − u) also for w = 1, which rounds: its conditional half is found all the same."""
    case = CASES["DreamLitePipeline"]
    teacher = Teacher(case.build(), case.call())
    assert teacher.guidance is not None and teacher.settings["off"] == {"guidance_scale": 1.0}
    one, two = (teacher.condition([p]).values["encoder_hidden_states"] for p in ("a red apple", "a red grape"))
    assert (one - two).abs().max() > 1e-3
    assert teacher.reproduce(4) <= 1e-5 and teacher.reproduce(4, 3.0) <= 1e-5


def test_without_a_negative_prompt_sdxl_has_zeros() -> None:
    """As its own call has (``force_zeros_for_empty_prompt``); an empty negative prompt is something else."""
    pipeline = CASES["StableDiffusionXLPipeline"].build()
    call = {k: v for k, v in CASES["StableDiffusionXLPipeline"].call().items() if k != "negative_prompt"}
    for more, zeros in (({}, True), ({"negative_prompt": ""}, False)):
        null = Teacher(pipeline, call | more).condition(["a red apple"]).null
        assert null is not None
        assert (float(null["encoder_hidden_states"].abs().max()) == 0) is zeros
    assert pipeline.config.force_zeros_for_empty_prompt


def test_a_damaged_weight_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of a cascade can fail: another weight in the written decoder stops the export."""
    student = student_of("KandinskyV22CombinedPipeline", steps=1)
    original = proof.reload

    def damaged(folder: Path, *args: Any, **settings: Any) -> Any:
        path = next((folder / "unet").glob("*.safetensors"))
        weights = load_file(path)
        save_file({k: v + 0.05 if k == "conv_out.bias" else v for k, v in weights.items()}, path, metadata={"format": "pt"})
        return original(folder, *args, **settings)

    monkeypatch.setattr("distill.export.reload", damaged)
    from distill.errors import UserError

    with pytest.raises(UserError, match="differs from the student"):
        export_diffusers(student, tmp_path / "student", **FACTS)
