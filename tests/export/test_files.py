"""Shards, variants and uploads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny import tiny_stable_diffusion, tiny_student, tiny_unet2d

from distill.errors import UserError
from distill.export import Format, NoStockScheduler, export_diffusers, export_few_step, load_export, push
from distill.export.files import check_shard_size
from distill.loading import load_pipeline

FACTS: dict[str, Any] = {"method": "dmd2", "teacher_name": "owner/teacher"}


def test_half_precision_in_shards(tmp_path: Path) -> None:
    student = tiny_student(tiny_stable_diffusion(), steps=1)
    export_diffusers(student, tmp_path / "student", format=Format(max_shard_size="50KB", variant="fp16"), **FACTS)
    unet = tmp_path / "student" / "unet"
    index = json.loads((unet / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text())
    shards = sorted({unet / name for name in index["weight_map"].values()})
    assert len(shards) > 2 and shards[0].name.startswith("diffusion_pytorch_model.fp16-00001-of-")
    weights = {k: v for shard in shards for k, v in load_file(shard).items()}
    assert index["metadata"]["total_size"] == sum(2 * v.numel() for v in weights.values())
    for name, p in student.denoiser.backbone.named_parameters():
        assert weights[name].dtype == torch.float16 and torch.equal(weights[name], p.detach().half()), name
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", variant="fp16", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float16
    assert student.denoiser.backbone.dtype == torch.float32  # the student itself stays as it is
    assert 'variant="fp16", torch_dtype=torch.float16' in (tmp_path / "student" / "README.md").read_text()
    assert load_export(tmp_path / "student").unet.dtype == torch.float32


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    student = tiny_student(tiny_unet2d(), steps=1)
    with torch.no_grad():
        next(iter(student.denoiser.backbone.parameters())).flatten()[0] = 1e5
    with pytest.raises(UserError, match="unet: .* is too large for fp16: use --variant bf16"):
        export_diffusers(student, tmp_path / "student", format=Format(variant="fp16"), **FACTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["5 gigabytes", "0GB", "GB", "-1GB"])
def test_sizes(size: str) -> None:
    check_shard_size("5GB")
    with pytest.raises(UserError, match="is no size"):
        check_shard_size(size)


def test_a_few_step_folder_is_loaded_without_trust_only_if_its_file_is_ours(tmp_path: Path) -> None:
    student = tiny_student(tiny_unet2d(), (1.0, 0.9, 0.2), 3)
    with pytest.raises(NoStockScheduler):
        export_diffusers(student, tmp_path / "student", **FACTS)
    assert list(tmp_path.iterdir()) == []
    export_few_step(student, tmp_path / "student", **FACTS)
    pipeline = load_pipeline(tmp_path / "student")
    assert type(pipeline).__name__ == "FewStepPipeline" and pipeline.settings["scheduler"]["timesteps"] == [999.0, 899.0, 199.0]
    file = tmp_path / "student" / "pipeline.py"
    file.write_text(file.read_text() + "\nprint('hello')\n")
    with pytest.raises(UserError, match="needs its own code"):
        load_pipeline(tmp_path / "student")
    assert load_pipeline(tmp_path / "student", trust_remote_code=True) is not None


def test_no_arguments_are_needed_and_wrong_ones_are_set_right(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = tiny_student(tiny_stable_diffusion(), (1.0, 0.7, 0.3), 3, guidance_scale=7.5)
    export_diffusers(student, tmp_path / "student", **FACTS)
    pipeline = load_pipeline(tmp_path / "student", few_step=True)

    def images(**call: Any) -> torch.Tensor:
        return torch.from_numpy(pipeline("a red apple", generator=torch.Generator().manual_seed(1), output_type="np", **call).images).permute(0, 3, 1, 2)

    right = student.images(["a red apple"], generator=torch.Generator().manual_seed(1))
    assert (images() - right).abs().max() <= 1e-4
    assert (images(guidance_scale=7.5, negative_prompt="a car") - right).abs().max() <= 1e-4  # said, and set right
    two = student.images(["a red apple"], steps=2, generator=torch.Generator().manual_seed(1))
    assert (images(num_inference_steps=2) - two).abs().max() <= 1e-4 and (two - right).abs().max() > 1e-3
    with pytest.raises(ValueError, match="samples in 1 to 3 steps, not 4"):
        pipeline("a red apple", num_inference_steps=4)
    import inspect

    defaults = inspect.signature(pipeline.__call__).parameters
    assert (defaults["num_inference_steps"].default, defaults["guidance_scale"].default) == (3, 1.0)


def test_two_few_step_students_in_one_process(tmp_path: Path) -> None:
    """diffusers runs both files as one module: each class must keep its own settings."""
    students = [tiny_student(tiny_stable_diffusion(), times, len(times)) for times in ((1.0, 0.7), (1.0, 0.9, 0.2))]
    pipelines = []
    for i, student in enumerate(students):
        export_few_step(student, tmp_path / str(i), **FACTS)
        pipelines.append(load_pipeline(tmp_path / str(i)))
    for student, pipeline in zip(students, pipelines, strict=True):
        images = pipeline("a cat", generator=torch.Generator().manual_seed(1), output_type="np").images
        ours = student.images(["a cat"], generator=torch.Generator().manual_seed(1))
        assert (torch.from_numpy(images).permute(0, 3, 1, 2) - ours).abs().max() <= 1e-4


# -- uploads ------------------------------------------------------------------------------------------------------------


class Hub:
    """A hub that notes what it is sent."""

    sent: list[tuple[str, ...]] = []

    def create_repo(self, name: str, **settings: Any) -> Any:
        if name.startswith("forbidden"):
            raise RuntimeError("403 Forbidden\nYou may not.")
        return type("Url", (str,), {"repo_id": name})(f"https://hub.example/{name}")

    def upload_folder(self, repo_id: str, folder_path: str, **settings: Any) -> None:
        self.sent.append((repo_id, *sorted(p.name for p in Path(folder_path).iterdir())))


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Hub.sent = []
    return Hub()


def test_uploads_ask_first(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "README.md").write_text("x")
    asked: list[str] = []

    def ask(answer: str) -> Any:
        return lambda question: asked.append(question) or answer  # type: ignore[func-returns-value]

    assert push.push(tmp_path, "me/student", yes=False, ask=ask("")) is None and hub.sent == []
    assert f"Upload {tmp_path} (1 files, 0.0 MB) to me/student" in asked[0]
    assert push.push(tmp_path, "me/student", yes=False, ask=ask("y")) == "https://hub.example/me/student"
    assert push.push(tmp_path, "me/student", yes=True) is not None and len(asked) == 2
    assert hub.sent == [("me/student", "README.md")] * 2
    with pytest.raises(UserError, match="could not be uploaded to forbidden/x: 403 Forbidden$"):
        push.push(tmp_path, "forbidden/x", yes=True)


def test_uploads_that_cannot_be_are_refused_early(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    push.check_reachable("me/student", yes=True)
    with pytest.raises(UserError, match="no terminal to ask on: add --yes"):
        push.check_reachable("me/student", yes=False)
    for name in ("student", "me/../x", "a/b/c"):
        with pytest.raises(UserError, match="is no repository"):
            push.check_reachable(name, yes=True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a login"):
        push.check_reachable("me/student", yes=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push.check_reachable("me/student", yes=True)
