"""Students of several networks: who answers, what is trained, and that checkpoints and exports hold all of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import perturb, tiny_stable_diffusion, tiny_unet2d

from distill.config import load_config
from distill.data.loader import TrainingData
from distill.denoiser import Condition
from distill.errors import UserError
from distill.experts import ByCondition, ByTime, Partition, Routed, find_route, of_prompts
from distill.export import NoStockScheduler, export_diffusers, export_few_step, export_lora
from distill.matching.rollout import roll_out
from distill.methods.phased_dmd import PhasedDMD
from distill.plan import make_plan
from distill.roles import LoRA, build_roles
from distill.run import load_student
from distill.sampling import Sampler, uniform_ladder
from distill.student import Student
from distill.teacher import Teacher
from distill.trainer import Trainer

PROMPTS = ["a red apple", "a blue car", "a green cat", "red", "photograph of a cat", "a photograph of a blue apple"]


def student_of(pipeline: Any, wanted: ByTime | Partition, lora: LoRA | None = None) -> Student:
    """A student of several networks, as if trained."""
    teacher = Teacher(pipeline)
    route = find_route(wanted, teacher)
    if teacher.input_name == "prompt":
        route = of_prompts(route, TrainingData(teacher, None, PROMPTS, 0).told, len(PROMPTS)) or route
    roles, adapters = build_roles(teacher, ["student", "critic"], lora, route=route)
    perturb(roles.parameters("student"))
    sampler = Sampler(uniform_ladder(2), 2, gamma=0.0 if isinstance(wanted, ByTime) else 1.0)
    return Student(teacher, roles.student, sampler, adapters)  # type: ignore[arg-type]


# -- who answers --------------------------------------------------------------------------------------------------------


def test_noise_levels() -> None:
    route = ByTime((1.0, 0.6, 0.25))
    assert route.choose(torch.tensor([1.0, 0.61, 0.6, 0.3, 0.25, 0.0]), Condition()).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=2)])
def test_a_mixed_batch_is_answered_by_each_samples_own_network(lora: LoRA | None) -> None:
    student = student_of(tiny_unet2d(), Partition(3), lora)
    network, labels = student.denoiser, [9, 0, 5, 3, 4, 7]
    assert isinstance(network, Routed) and network.route.choose(torch.empty(0), student.teacher.condition(labels)).tolist() == [2, 0, 1, 0, 1, 2]
    x, t, told = torch.randn(6, 1, 8, 8), torch.linspace(0.2, 1, 6).double(), student.teacher.condition(labels)
    said = network.predict(x, t, told, ("mid_block",))
    for i, k in enumerate([2, 0, 1, 0, 1, 2]):
        alone = network.experts[k].predict(x[i : i + 1], t[i : i + 1], told[i : i + 1], ("mid_block",))
        torch.testing.assert_close(said.value[i], alone.value[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(said.features["mid_block"][i], alone.features["mid_block"][0], atol=1e-5, rtol=1e-5)
    other = network.experts[0].predict(x, t, told).value
    assert float((other[0] - said.value[0]).detach().abs().max()) > 1e-3
    early = network.features(x, t, told, ("mid_block",))["mid_block"]
    torch.testing.assert_close(early, said.features["mid_block"], atol=1e-5, rtol=1e-5)
    names = network.named_parameters()
    assert {n.split(".")[0] for n in names} == {"1", "2", "3"} and len({id(p) for p in names.values()}) == len(names)


def test_one_part_is_no_partition_at_all() -> None:
    teacher = Teacher(tiny_unet2d())
    roles, _ = build_roles(teacher, ["student"], route=find_route(Partition(1), teacher))
    assert not isinstance(roles.student, Routed)


def test_a_teacher_that_is_told_nothing_has_no_parts() -> None:
    with pytest.raises(UserError, match="classes or prompts"):
        find_route(Partition(2), Teacher(tiny_unet2d(None)))
    with pytest.raises(UserError, match="11 students, and the teacher has 10 classes"):
        find_route(Partition(11), Teacher(tiny_unet2d()))


def test_prompts_that_cannot_be_told_apart() -> None:
    with pytest.raises(UserError, match="2 equal parts"):
        ByCondition.of_vectors("x", torch.ones(4, 3), "abcd", 2)


# -- training -----------------------------------------------------------------------------------------------------------


def test_a_phase_has_a_gradient_in_its_own_network_alone() -> None:
    student = student_of(tiny_unet2d(), ByTime((1.0, 0.5))).denoiser
    assert isinstance(student, Routed)
    told, noise = Teacher(tiny_unet2d()).condition([1, 2]), torch.randn(2, 1, 8, 8)
    for within, s in (((0, 2), 0.5), ((2, 4), None)):
        for _ in range(6):  # a drawn step goes all of the way
            sample = roll_out(student, "phase", uniform_ladder(4), noise, told, gradient_steps=3, within=within)
            assert (None if sample.s is None else float(sample.s[0])) == s
            reached = [any(g is not None for g in torch.autograd.grad(sample.x.sum(), list(e.parameters()), allow_unused=True, retain_graph=True))
                       for e in student.experts]
            assert reached == ([True, False] if within == (0, 2) else [False, True])


RECIPE = """\
teacher: {pipeline: assets/digits-teacher}
student: STUDENT
method: METHOD
trainer: {steps: 10, batch_size: 4, device: cpu}
output: {folder: FOLDER}
"""
PHASED, MSD = "{name: phased_dmd, critic_steps: 1}", "{name: msd, critic_steps: 1}"


def trainer(tmp_path: Path, method: str, student: str = "{ema: 0.9}", resume: bool = False, **more: str) -> Trainer:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.replace("STUDENT", student).replace("METHOD", method).replace("FOLDER", str(tmp_path / "run"))
    for old, new in more.items():
        text = text.replace(old, new)
    recipe.write_text(text)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text(text)
    return Trainer(load_config(recipe), tmp_path / "run", resume)


LORA = "{weights: lora, ema: 0.9, lora: {rank: 2}}"
HALF = "{ema: 0.9, architecture: {block_out_channels: [16, 24]}}"


STAGES = "{name: msd, teacher_matching: 0.4, students: 3}"


@pytest.mark.parametrize(("method", "student"), [(PHASED, "{ema: 0.9}"), (PHASED, LORA), (MSD, LORA), (STAGES, HALF)])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, method: str, student: str) -> None:
    """Stopped before the second phase and in it."""
    data = {"trainer:": "data: {source: digits}\ntrainer:"} if "matching" in method else {}
    whole = trainer(tmp_path, method, student, **data)
    losses = []
    for step in range(8):
        if step in (4, 7):
            whole.save(step)
        losses.append({k: float(v) for k, v in whole.step(step).items()})
    for step in (7, 4):
        again = trainer(tmp_path, method, student, resume=True, **data)
        assert again.start == step
        assert [{k: float(v) for k, v in again.step(i).items()} for i in range(step, 8)] == losses[step:]
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize("weights", ["{ema: 0.9}", LORA, "{weights: lora, lora: {rank: 2, dora: true}}"])
def test_with_each_phase_the_critic_begins_anew_and_the_others_stand_still(tmp_path: Path, weights: str) -> None:
    run = trainer(tmp_path, PHASED, weights)
    experts = run.roles.student.experts  # type: ignore[attr-defined]

    def weights_of(network: Any) -> list[torch.Tensor]:
        return [p.detach().clone() for p in network.parameters()]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first, second, critic = (weights_of(n) for n in (*experts, run.roles.critic))
    for step in range(5):
        run.step(step)
    assert not same(first, weights_of(experts[0])) and same(second, weights_of(experts[1])) and not same(critic, weights_of(run.roles.critic))
    first, learnt = weights_of(experts[0]), len(run.optimizers["critic"].state)
    seen: list[bool] = []
    sample = PhasedDMD._sample

    def watching(self: Any, roles: Any, batch: Any, fresh: bool = False) -> Any:
        seen.append(same(critic, weights_of(roles.critic)) and not run.optimizers["critic"].state)
        return sample(self, roles, batch, fresh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhasedDMD, "_sample", watching)
        run.step(5)
        run.step(6)
    assert seen[0] and not any(seen[2:]) and learnt == len(run.optimizers["critic"].state) > 0
    assert same(first, weights_of(experts[0])) and not same(second, weights_of(experts[1]))


def test_learning_rates_fall_to_zero_in_each_phase(tmp_path: Path) -> None:
    run = trainer(tmp_path, PHASED, **{"trainer:": "optimizers: {student: {lr: 1e-3, decay: linear}}\ntrainer:"})
    rates = []
    for step in range(10):
        run.step(step)
        rates.append(run.optimizers["student"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4] * 2)


def test_a_partition_of_prompts_is_read_from_the_data_and_kept(tmp_path: Path) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    data = f"data: {{source: prompts, path: {tmp_path}/prompts.txt, cache: false}}"
    changes = {"assets/digits-teacher": str(tmp_path / "teacher"), "trainer:": f"{data}\ntrainer:"}
    run = trainer(tmp_path, MSD, **changes)
    route = run.roles.student.route  # type: ignore[attr-defined]
    told = run.parts.teacher.condition(PROMPTS)
    assert torch.bincount(route.choose(torch.empty(0), told)).tolist() == [3, 3] and set(route.examples) <= set(PROMPTS)
    for step in range(3):
        run.step(step)
    run.save(3)
    (tmp_path / "prompts.txt").unlink()  # not asked again
    (tmp_path / "prompts.txt").write_text("x")
    student, _ = load_student(tmp_path / "run")
    assert isinstance(student.denoiser, Routed) and isinstance(student.denoiser.route, ByCondition)
    assert torch.equal(student.denoiser.route.axes, route.axes) and student.denoiser.route.examples == route.examples
    with run.averaged():
        ours = run.parts.student.images(PROMPTS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(student.images(PROMPTS, generator=torch.Generator().manual_seed(0)), ours)


def test_plans(tmp_path: Path) -> None:
    plan = make_plan(trainer(tmp_path, PHASED).config)
    assert plan.parameters["student"]["trained"] == 2 * plan.parameters["critic"]["trained"] == 2 * plan.parameters["teacher"]["parameters"]
    assert not plan.notes and plan.flops["student backward"] > 0
    assert {(c["role"], c["batch"]) for c in plan.calls} == {("teacher", 4), ("critic", 4), ("student", 4)}


# -- export -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)])
@pytest.mark.parametrize("wanted", [ByTime((1.0, 0.5)), Partition(3)])
@pytest.mark.parametrize(("make", "name", "inputs"), [(tiny_unet2d, "class_labels", [0, 9, 4, 5, 3]), (tiny_stable_diffusion, "prompt", PROMPTS)])
def test_diffusers_makes_the_students_images(tmp_path: Path, make: Any, name: str, inputs: list[Any], wanted: Any, lora: LoRA | None) -> None:
    """Loaded and called with diffusers alone; saved again by the loaded pipeline; each network in its place."""
    student = student_of(make(), wanted, lora)
    export_few_step(student, tmp_path / "student", method="x", teacher_name="owner/teacher")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    count = len(student.networks)
    assert [f"unet_{k + 1}" in pipeline.components for k in range(1, count + 1)] == [True] * (count - 1) + [False]

    def images(pipe: Any, steps: int) -> torch.Tensor:
        made = pipe(**{name: inputs}, num_inference_steps=steps, generator=torch.Generator().manual_seed(9), output_type="np").images
        return torch.from_numpy(made).permute(0, 3, 1, 2)

    for steps in (1, 2):
        ours = student.images(inputs, steps=steps, generator=torch.Generator().manual_seed(9))
        assert float((images(pipeline, steps) - ours).abs().max()) <= 1e-4
    pipeline.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again, 2), images(pipeline, 2))
    again.unet, again.unet_2 = again.unet_2, again.unet
    assert float((images(again, 2) - images(pipeline, 2)).abs().max()) > 1e-3
    assert "**Networks**: `unet`" in (tmp_path / "student" / "README.md").read_text()
    assert json.loads((tmp_path / "student" / "distill.json").read_text())["few_step"]["settings"]["experts"]["component"] == "unet"


def test_other_forms_say_why_not(tmp_path: Path) -> None:
    student = student_of(tiny_unet2d(), ByTime((1.0, 0.5)), LoRA(rank=2, alpha=2))
    with pytest.raises(NoStockScheduler, match="chooses among 2 networks: use --to few-step"):
        export_diffusers(student, tmp_path / "a", method="x", teacher_name="owner/teacher")
    with pytest.raises(UserError, match="no single LoRA: use --to few-step"):
        export_lora(student, tmp_path / "b", method="x", teacher_name="owner/teacher")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("STUDENT", "{weights: lora}").replace("METHOD", PHASED).replace("FOLDER", "x, export: [lora]"))
    with pytest.raises(UserError, match="no single LoRA: use few-step"):
        load_config(tmp_path / "recipe.yaml")
