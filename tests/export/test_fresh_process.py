"""What is exported loads in a process that has diffusers and peft and has never heard of this toolkit."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_student, tiny_unet2d

from distill.export import Format, carry_code, export_diffusers, export_few_step, export_lora
from distill.roles import LoRA

FACTS: dict[str, Any] = {"method": "dmd2", "teacher_name": "owner/teacher"}
ADAPTER = LoRA(rank=4, alpha=8)

SCRIPT = """
import json, sys
import numpy as np, torch, diffusers
from diffusers import DiffusionPipeline
from peft import PeftModel

def load(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def save(name, pipe, *args, **call):
    images = pipe(*args, **call, generator=torch.Generator().manual_seed(5), output_type="np").images
    np.save(name + ".npy", images)

def scheduler(pipe, folder):
    name = json.load(open(folder + "/scheduler/scheduler_config.json"))["_class_name"]
    pipe.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return pipe

BODY
assert not any(name.split(".")[0] == "distill" for name in sys.modules)
"""


def fresh(folder: Path, body: str) -> None:
    """Run the lines in an isolated interpreter, in the folder."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    script = SCRIPT.replace("BODY", textwrap.dedent(body))
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def ours(student: Any, inputs: list[Any], steps: int) -> np.ndarray[Any, Any]:
    images = student.images(inputs, steps=steps, generator=torch.Generator().manual_seed(5))
    return images.permute(0, 2, 3, 1).numpy()


def test_everything_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """One process for all, since importing diffusers takes seconds. One step where the stock class draws noise from
    PyTorch's global generator (DiT, SD3); the few-step file takes the call's generator everywhere."""
    expected: dict[str, np.ndarray[Any, Any]] = {}
    prompts = ["a red apple", "a blue car"]

    sd = tiny_student(tiny_stable_diffusion(), lora=ADAPTER)
    tiny_stable_diffusion().save_pretrained(tmp_path / "sd")
    export_diffusers(sd, tmp_path / "sd-student", **FACTS)
    export_lora(sd, tmp_path / "sd-lora", **FACTS)
    export_lora(sd, tmp_path / "sd-kohya", names="kohya", **FACTS)
    for name in ("stock", "few", "lora", "kohya"):
        expected[f"sd-{name}"] = ours(sd, prompts, 4)

    odd = tiny_student(tiny_stable_diffusion(), (1.0, 0.77777), 2, gamma=0.5)
    export_few_step(odd, tmp_path / "odd-student", format=Format(max_shard_size="50KB"), **FACTS)
    expected["odd"] = ours(odd, prompts, 2)
    assert len(list((tmp_path / "odd-student" / "unet").glob("*.safetensors"))) > 2

    dit = tiny_student(tiny_dit(), steps=2, lora=ADAPTER)
    tiny_dit().save_pretrained(tmp_path / "dit")
    export_lora(dit, tmp_path / "dit-lora", **FACTS)
    expected["dit-peft"] = ours(dit, [7, 8], 1)

    sd3 = tiny_student(tiny_sd3(), (1.0, 0.9, 0.75, 0.5), lora=ADAPTER)
    tiny_sd3().save_pretrained(tmp_path / "sd3")
    export_diffusers(sd3, tmp_path / "sd3-student", **FACTS)
    export_lora(sd3, tmp_path / "sd3-lora", **FACTS)
    expected["sd3-stock"] = expected["sd3-lora"] = ours(sd3, prompts, 1)
    expected["sd3-few"] = ours(sd3, prompts, 4)

    digits = tiny_student(tiny_unet2d(), (1.0, 0.9, 0.2), 3)
    export_few_step(digits, tmp_path / "digits-student", **FACTS)
    expected["digits"] = ours(digits, [3, 4], 3)

    adapted = tiny_student(tiny_unet2d(), (1.0, 0.4), 2, lora=ADAPTER)
    tiny_unet2d().save_pretrained(tmp_path / "digits")
    carry_code(tmp_path / "digits", "UNet2DPipeline")
    export_lora(adapted, tmp_path / "digits-lora", **(FACTS | {"teacher_name": "digits"}))
    expected["digits-lora"] = ours(adapted, [3, 4], 2)
    card = (tmp_path / "digits-lora" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    few = card.replace(str(tmp_path) + "/", "").replace("image = ", "# ")

    fresh(tmp_path, few + textwrap.dedent("""
    save("digits-lora", pipe, [3, 4])
    prompts = ["a red apple", "a blue car"]
    save("sd-stock", load("sd-student"), prompts, num_inference_steps=4, guidance_scale=1.0)
    save("sd-few", load("sd-student", custom_pipeline="pipeline", trust_remote_code=True), prompts)
    for kind in ("lora", "kohya"):
        pipe = load("sd")
        pipe.load_lora_weights("sd-" + kind)
        save("sd-" + kind, scheduler(pipe, "sd-" + kind), prompts, num_inference_steps=4, guidance_scale=1.0)
    save("odd", load("odd-student", trust_remote_code=True), prompts)

    pipe = load("dit")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "dit-lora").merge_and_unload()
    save("dit-peft", scheduler(pipe, "dit-lora"), [7, 8], num_inference_steps=1, guidance_scale=1.0)

    none = {"text_encoder_3": None, "tokenizer_3": None}
    save("sd3-stock", load("sd3-student", **none), prompts, num_inference_steps=1, sigmas=[1.0], guidance_scale=1.0)
    save("sd3-few", load("sd3-student", custom_pipeline="pipeline", trust_remote_code=True, **none), prompts)
    pipe = load("sd3", **none)
    pipe.load_lora_weights("sd3-lora")
    save("sd3-lora", scheduler(pipe, "sd3-lora"), prompts, num_inference_steps=1, sigmas=[1.0], guidance_scale=1.0)
    save("digits", load("digits-student", trust_remote_code=True), [3, 4])
    """))
    for name, images in expected.items():
        assert images.std() > 0.01, name
        assert np.abs(np.load(tmp_path / f"{name}.npy") - images).max() <= 1e-4, name


PRIVATE = '''
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class WarmUNet(UNet2DModel):
    """A UNet of a user's own."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return super().forward(sample * 0.9, timestep, class_labels, return_dict)


class WarmPipeline(DiffusionPipeline):
    """A pipeline of a user's own."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=20, generator=None, output_type="np", guidance_scale=1.0):
        labels = torch.as_tensor(class_labels)
        x = randn_tensor((len(labels), 1, 8, 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t, labels).sample, t, x, generator=generator).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1)
        return ImagePipelineOutput(images=images.permute(0, 2, 3, 1).numpy() if output_type == "np" else images)
'''


def test_a_private_pipeline_travels_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import unet2d, vp_scheduler

    (tmp_path / "warm_private.py").write_text(PRIVATE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import warm_private  # type: ignore[import-not-found]

    unet = warm_private.WarmUNet.from_config(unet2d().config)
    pipeline = warm_private.WarmPipeline(unet.eval(), vp_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    student = tiny_student(pipeline, steps=2)
    export_diffusers(student, tmp_path / "exported" / "student", **FACTS)
    index = json.loads((tmp_path / "exported" / "student" / "model_index.json").read_text())
    assert index["_class_name"] == ["warm_private", "WarmPipeline"] and index["unet"] == ["warm_private", "WarmUNet"]
    fresh(tmp_path / "exported", """
    save("stock", load("student", trust_remote_code=True), [1, 2], num_inference_steps=2)
    save("few", load("student", custom_pipeline="pipeline", trust_remote_code=True), [1, 2])
    """)
    for name in ("stock", "few"):
        assert np.abs(np.load(tmp_path / "exported" / f"{name}.npy") - ours(student, [1, 2], 2)).max() <= 1e-4
