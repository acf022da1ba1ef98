"""``distill plan``: sizes that can be worked out by hand, the trace against a real step's tensors, advice, and wrong inputs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pipeline_configs
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from distill import plan_advice
from distill.cli import main
from distill.config import Config, load_config
from distill.errors import UserError
from distill.methods import find_method
from distill.plan import GIB, Memory, Plan, make_plan
from distill.plan_pipeline import hollow_teacher
from distill.plan_trace import Precision, Scale, _AsOnDevice, checkpoint_blocks
from distill.run import build
from distill.teacher import Teacher

ADAPTERS = ("student.weights=lora", "student.lora.rank=4")
QUICKSTART = ["trainer.batch_size=16", "method.critic_steps=1"]


def write_recipe(folder: Path, unet: dict[str, Any], prompts: str, critic_steps: int, batch_size: int) -> Path:
    """A recipe of guided DMD2 for a Stable Diffusion of which there is the configuration only."""
    pipeline_configs.write_stable_diffusion(folder / "sd", unet)
    (folder / "prompts.txt").write_text(prompts)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"teacher: {{pipeline: {folder / 'sd'}}}\nmethod: {{name: dmd2, guidance_scale: 4.0, critic_steps: {critic_steps}}}\n"
        f"data: {{source: prompts, path: {folder / 'prompts.txt'}}}\ntrainer: {{batch_size: {batch_size}}}\noutput: {{folder: {folder / 'run'}}}\n"
    )
    return recipe


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small Stable Diffusion, and a recipe for it."""
    folder = tmp_path_factory.mktemp("plan")
    small = {
        "sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "cross_attention_dim": 24, "norm_num_groups": 4, "attention_head_dim": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    return write_recipe(folder, small, "a cat\na dog\na cat\n", critic_steps=2, batch_size=2)


@functools.cache
def planned(recipe: Path, *overrides: str, device: str = "cpu", memory: Memory | None = None) -> Plan:
    """Plans are shared between the tests: each traces a step."""
    return make_plan(load_config(recipe, overrides), device, memory)


# -- what stands --------------------------------------------------------------------------------------------------------


def test_weights_and_optimizer_by_hand() -> None:
    """Full weights, fp32: each role 4 bytes a parameter, Adam twice what is trained, the average once the student."""
    config = load_config("quickstart", QUICKSTART)
    plan = make_plan(config, "cpu")
    parts = build(config)
    count = {role: sum(p.numel() for p in parts.roles.parameters(role)) for role in ("student", "critic", "discriminator")}
    assert {role: plan.parameters[role]["trained"] for role in count} == count
    assert plan.memory["teacher weights"] == plan.memory["student weights"] == 4 * count["student"]
    assert plan.memory["optimizer states"] == 8 * sum(count.values())
    assert plan.memory["averaged weights"] == 4 * count["student"]
    assert plan.peak == sum(plan.memory.values())


def test_calls_and_updates_of_dmd2(sd: Path) -> None:
    """One student update and two of the critic: the student makes three samples; the teacher is guided in one doubled batch;
    the critic is asked once for its score, and twice to learn."""
    plan = planned(sd)
    assert [(c["role"], c["batch"], c["forwards"]) for c in plan.calls] == [("critic", 2, 3), ("student", 2, 3), ("teacher", 4, 1)]
    assert plan.updates == {"student": 1, "critic": 2}
    assert plan.flops["student forward"] == plan.flops["critic forward"]
    assert plan.flops["teacher forward"] * 3 == plan.flops["student forward"] * 2
    # A backward pass is two products for each of the forward's, and two and a half in attention, which computes its weights again.
    assert 1.9 < plan.flops["critic backward"] / (plan.flops["critic forward"] * 2 / 3) < 2.2


def test_work_of_one_forward(sd: Path) -> None:
    """The count of a real forward on the CPU by PyTorch's own counter."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    unet = UNet2DConditionModel.from_config(json.loads((sd.parent / "sd/unet/config.json").read_text()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, 24))
    plan = planned(sd)
    assert plan.flops["student forward"] == 3 * counter.get_total_flops()


def test_lora_shares_one_backbone(sd: Path) -> None:
    full, lora = planned(sd), planned(sd, *ADAPTERS)
    assert lora.memory["shared backbone weights"] == full.memory["teacher weights"]
    assert lora.parameters["student"] == lora.parameters["critic"] and lora.parameters["teacher"] == full.parameters["teacher"]
    assert lora.memory["student weights"] == 4 * lora.parameters["student"]["parameters"] < full.memory["student weights"] / 2
    assert lora.peak < full.peak


def test_data_is_cached_or_stays(sd: Path) -> None:
    """Two different prompts, each with 77 × 24 numbers; the null prompt beside each."""
    cached, kept = planned(sd), planned(sd, "data.cache=false")
    assert "data" not in cached.memory and cached.disk["cache"] == 2 * 2 * 77 * 24 * 4
    assert kept.memory["data"] == 2 * 2 * 77 * 24 * 4 and kept.disk["cache"] == 0


def test_disk(sd: Path) -> None:
    plan = planned(sd)
    trained = sum(row["trained"] for row in plan.parameters.values())
    assert plan.disk["checkpoint"] == 4 * (3 * trained + plan.parameters["student"]["trained"])
    assert plan.disk["checkpoints"] == 3 * plan.disk["checkpoint"]  # the two that are kept, and one that is being written


# -- what the trace says ------------------------------------------------------------------------------------------------


def test_scale_weighs_what_is_alive() -> None:
    """y = relu(x W): x and y stand, x W does not outlive its use; the backward pass makes the gradient of W and one of x W."""
    x, w = torch.empty(8, 32, device="meta"), torch.empty(32, 64, device="meta", requires_grad=True)
    scale = Scale()
    scale.add(w, "weights")
    scale.add(x, "data")
    with scale:
        y = torch.relu(x @ w)
        assert scale.alive["activations"] == 8 * 64 * 4  # relu keeps its result, and the product is gone
        y.sum().backward()
    assert scale.alive["weights"] == 32 * 64 * 4
    assert scale.trace.flops["losses and heads"] == 2 * 2 * 8 * 32 * 64
    del y
    assert scale.alive["activations"] == 32 * 64 * 4  # the gradient of W


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_for_backward_as_on_a_cpu(autocast: bool) -> None:
    """What a block keeps for its backward pass on the meta device is what PyTorch keeps on the CPU."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.qkv = nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.Linear(32, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = functional.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
            q, k, v = (part.reshape(len(x), -1, 4, 8).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
            return functional.scaled_dot_product_attention(q, k, v)

    def kept(device: str) -> int:
        torch.manual_seed(0)
        block, storages = Block().to(device), dict[int, int]()
        held: list[Any] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        own = {p.untyped_storage()._cdata for p in block.parameters()}
        as_there = torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False)
        as_here = _AsOnDevice(Precision(torch.bfloat16 if autocast else None, cuda=False))
        with as_there if device == "cpu" else as_here, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(torch.ones(2, 4, 16, 16, device=device))
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        return sum(n for key, n in storages.items() if key not in own)

    assert kept("meta") == pytest.approx(kept("cpu"), rel=0.02)


def test_checkpointing_trades_activations_for_work(sd: Path) -> None:
    plain, less = planned(sd, *ADAPTERS), planned(sd, *ADAPTERS, "trainer.gradient_checkpointing=true")
    assert less.memory["activations"] < 0.8 * plain.memory["activations"]
    assert less.flops["student backward"] > 1.3 * plain.flops["student backward"]
    assert less.flops["student forward"] == plain.flops["student forward"]


def test_activations_grow_with_the_batch(sd: Path) -> None:
    one, four = planned(sd), planned(sd, "trainer.batch_size=8")
    assert 3 < four.memory["activations"] / one.memory["activations"] <= 4.01
    assert {k: 4 * v for k, v in one.flops.items()} == four.flops


def test_accumulation_keeps_gradients_beside_activations(sd: Path) -> None:
    one, three = planned(sd), planned(sd, "trainer.accumulate=3")
    assert three.peak > one.peak
    assert three.flops == {k: 3 * v for k, v in one.flops.items()}


def test_bfloat16_halves_weights_and_activations(sd: Path) -> None:
    large = "trainer.batch_size=8"  # beside which the casts of the student's float32 weights are small
    wide, narrow = planned(sd, large), planned(sd, large, "teacher.dtype=bfloat16")
    assert 2 * narrow.memory["teacher weights"] == wide.memory["teacher weights"]
    assert narrow.memory["activations"] < 0.75 * wide.memory["activations"]


def test_offload_takes_the_teacher_off_the_device(sd: Path) -> None:
    here, away = planned(sd), planned(sd, "trainer.offload=true")
    size = here.memory["teacher weights"]
    assert here.peak - size <= away.peak <= here.peak
    assert away.memory.get("teacher weights", 0) == (size if away.during == "teacher forward" else 0)


def test_a_method_that_reads_values_is_planned_without_activations(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = find_method("dmd2")
    original = method.step

    def curious(self: Any, roles: Any, batch: Any) -> Any:
        float(batch.noise.mean())
        yield from original(self, roles, batch)

    monkeypatch.setattr(method, "step", curious)
    plan = make_plan(load_config(sd), "cpu")
    assert "activations" not in plan.memory and "not estimated" in plan.notes[0]
    assert plan.memory["student weights"] > 0


def test_calls_of_a_method_that_draws_its_steps(sd: Path) -> None:
    """A four-step student's sample takes 1, 2, 3 or 4 calls, 2.5 on average; a step of DMD2 makes three samples here."""
    plan = planned(sd, "method.steps=4")
    calls = {c["role"]: c["forwards"] for c in plan.calls}
    assert calls["student"] == pytest.approx(7.5, abs=3.5 * (3 * 1.25 / 32) ** 0.5)  # 3.5 standard errors of 32 draws
    assert calls["critic"] == 3 and calls["teacher"] == 1
    assert plan.flops["student forward"] / plan.flops["critic forward"] == pytest.approx(calls["student"] / 3)


def test_checkpointing_recomputes_with_the_adapter_of_the_forward() -> None:
    """Else the second computation saves other tensors than the first, and PyTorch refuses."""
    from distill.adapters import LoRA
    from distill.roles import build_roles

    teacher = Teacher(tiny.tiny_stable_diffusion())
    roles, adapters = build_roles(teacher, ["student", "critic"], LoRA(2, 2.0))
    assert adapters is not None
    checkpoint_blocks(teacher.backbone, Precision(), adapters)
    x, condition = torch.randn(1, 4, 8, 8), teacher.condition(["a cat"])
    loss = roles.student(x, torch.tensor([0.5]), condition).square().mean()
    assert roles.critic is not None
    roles.critic(x, torch.tensor([0.5]), condition)
    loss.backward(inputs=roles.parameters("student"))
    assert any(float(p.grad.abs().max()) > 0 for p in roles.parameters("student") if p.grad is not None)


# -- advice -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "gib"), [("24GB", 24), ("24 GiB", 24), ("8", 8), ("1.5g", 1.5)])
def test_gpu_sizes(text: str, gib: float) -> None:
    assert plan_advice.parse_gpu(text) == gib * GIB


def test_advice_stops_at_the_first_combination_that_fits(sd: Path) -> None:
    config = load_config(sd)
    plan = planned(sd, device="cuda")
    roomy = plan_advice.advise(config, plan, 80 * GIB)
    assert roomy.fits and not roomy.steps
    with_ckpt = planned(sd, device="cuda", memory=Memory(checkpointing=True)).peak
    between = round(((with_ckpt + plan.peak) / 2 + plan_advice.CONTEXT) / (1 - plan_advice.FRAGMENTED))
    advice = plan_advice.advise(config, plan, between)
    assert not advice.fits and advice.chosen == ("trainer.gradient_checkpointing=true",)
    assert advice.steps[0].peak == with_ckpt and advice.steps[0].saves == plan.peak - with_ckpt


def _peaks(saves: dict[str, int]) -> Any:
    """A planner that knows by heart what each setting takes off 100 GiB."""

    def plan(config: Config, memory: Memory) -> Plan:
        on = {
            "checkpointing": memory.checkpointing, "lora": config.student.weights == "lora", "bfloat16": config.teacher.dtype == "bfloat16",
            "8bit": config.optimizers.student.name == "adamw8bit", "one": config.trainer.batch_size == 1, "4bit": memory.quantize == "4bit",
            "offload": memory.offload,
        }
        size = 100 - sum(saves.get(name, 0) for name, is_on in on.items() if is_on)
        return Plan("", "", "", (1,), 1, 1, "cuda", {}, {"activations": size * GIB}, "", [], {}, {}, {}, {})

    return plan


def test_advice_goes_from_harmless_to_harmful(sd: Path) -> None:
    config, saves = load_config(sd), dict.fromkeys(("checkpointing", "lora", "bfloat16", "8bit", "one", "4bit", "offload"), 10)
    known = _peaks(saves)
    advice = plan_advice.advise(config, known(config, Memory()), 8 * GIB, known)
    assert not advice.fits and advice.chosen == ()
    assert [step.settings for step in advice.steps] == [
        ("trainer.gradient_checkpointing=true",), ("student.weights=lora",), ("teacher.dtype=bfloat16",), ("optimizers.student.name=adamw8bit",),
        ("trainer.batch_size=1", "trainer.accumulate=2"), ("teacher.quantize=4bit",),
    ]  # a shared backbone is never idle: no offload
    assert [step.peak for step in advice.steps] == [n * GIB for n in (90, 80, 70, 60, 50, 40)]
    assert all(step.saves == 10 * GIB for step in advice.steps)


def test_advice_leaves_out_what_was_not_needed(sd: Path) -> None:
    """Checkpointing 90, adapters 85, bfloat16 45: of 60 GiB, with the last one the adapters are not wanted."""
    config, known = load_config(sd), _peaks({"checkpointing": 10, "lora": 5, "bfloat16": 40})
    advice = plan_advice.advise(config, known(config, Memory()), 64 * GIB, known)
    assert advice.chosen == ("trainer.gradient_checkpointing=true", "teacher.dtype=bfloat16")


# -- the command --------------------------------------------------------------------------------------------------------


def test_command_prints_a_plain_table(sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(sd), "--gpu", "24GB"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    assert "teacher weights" in out and "fits a GPU of 24 GiB" in out and "StableDiffusionPipeline" in out


def test_command_as_json(sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(sd), "--json", "--set", "trainer.batch_size=1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak"] == sum(plan["memory"].values()) and plan["batch_size"] == 1 and plan["flops_per_step"] == sum(plan["flops"].values())


@pytest.mark.parametrize(("arguments", "words"), [
    (["nowhere.yaml"], "there is no recipe"),
    (["quickstart", "--gpu", "big"], "--gpu big"),
    (["quickstart", "--gpu", "0"], "--gpu 0"),
    (["quickstart", "--set", "teacher.pipeline=/nowhere/at/all"], "/nowhere/at/all"),
    (["quickstart", "--set", "trainer.batch=2"], "batch_size"),
])
def test_wrong_inputs_end_in_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


@pytest.mark.parametrize(("name", "content", "words"), [
    ("model_index.json", "{", "not valid JSON"),
    ("config.json", '{"_class_name": "UNet2DModel", "down_block_types": ["NoBlock"]}', "UNet2DModel"),
    ("config.json", '{"_class_name": "AutoencoderKL"}', "AutoencoderKL"),
    ("config.json", "[]", "JSON object"),
    ("readme.txt", "hello", "neither a model_index.json nor"),
])
def test_broken_configurations(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        hollow_teacher(str(tmp_path))


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="nobody/nothing cannot be planned.*offline"):
        hollow_teacher("nobody/nothing")


def test_a_recipe_for_another_machine(sd: Path) -> None:
    """A CUDA run is planned where there is no CUDA."""
    config = load_config(sd, ["trainer.device=cuda"], anywhere=True)
    assert config.trainer.device == "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            load_config(sd, ["trainer.device=cuda"])


# -- against a real step ------------------------------------------------------------------------------------------------


def measured(recipe: Path | str, overrides: list[str], device: str = "cpu") -> dict[str, Any]:
    tool = Path(__file__).parents[1] / "tools/measure_plan.py"
    sets = [x for o in overrides for x in ("--set", o)]
    environment = os.environ | {"PYTHONPATH": str(tool.parents[1])}
    done = subprocess.run([sys.executable, str(tool), str(recipe), *sets, "--device", device, "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("overrides", [[], ["student.weights=lora", "student.lora.rank=16"]])
def test_within_15_percent_of_a_real_step(tmp_path: Path, overrides: list[str]) -> None:
    """A UNet of 37 M parameters, DMD2, guided teacher: the peak of the process against the plan."""
    unet = {
        "sample_size": 32, "block_out_channels": [128, 256, 256], "cross_attention_dim": 192, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    }
    recipe = write_recipe(tmp_path, unet, "a cat\n", critic_steps=1, batch_size=4)
    found = measured(recipe, overrides)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)
