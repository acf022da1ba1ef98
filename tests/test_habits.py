"""Habits of pipelines, each on a small one of our own that has it: the calling convention is found, and the teacher is right."""

import copy
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ConfigMixin, DDIMParallelScheduler, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from distill.batching import takes_several
from distill.call import flatten, unflatten
from distill.errors import UserError
from distill.export.assembly import assemble
from distill.methods.dmd2 import DMD2
from distill.overrides import Override
from distill.recording import schedulers, stepping_methods
from distill.roles import build_roles
from distill.running import after_steps
from distill.student import Student
from distill.teacher import Teacher


class Pipe(DiffusionPipeline):
    """A network and a scheduler; each class below has a loop of its own."""

    def __init__(self, net: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)


def made(cls: type[Pipe], net: type[nn.Module], scheduler: type = DDIMScheduler) -> Any:
    torch.manual_seed(0)
    return cls(net(), scheduler(clip_sample=False))


class Net(ModelMixin, ConfigMixin):
    """Rows of four numbers, moved by a time and a told row."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def rows(self, x: Tensor, t: Tensor, told: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x + told) + t.reshape(-1, *(1,) * (x.dim() - 1)) / 1000))


def letters(prompt: str) -> Tensor:
    """Numbers of a prompt's letters, (length,)."""
    return torch.tensor([ord(c) % 7 for c in prompt] or [0])


# -- one sample per call ------------------------------------------------------------------------------------------------


class PackedNet(Net):
    """One sample and its prompt as one sequence, with a time for each token of the sample."""

    def forward(self, tokens: list[Tensor], ids: Tensor, length: int, times: Tensor, return_dict: bool = True) -> Any:
        sequence = torch.cat([*tokens, ids[:, None].float().expand(-1, 4)])
        if len(sequence) != length:
            raise ValueError("one sample per call")
        return ([self.rows(sequence[: len(times)], times, sequence.mean())],)


class PackedPipe(Pipe):
    """Takes one prompt; of a list it makes a longer one."""

    @torch.no_grad()
    def __call__(
        self, prompt: Any, negative_prompt: Any = "", guidance_scale: float = 2.0, num_inference_steps: int = 20, generator: Any = None,
    ) -> Tensor:
        told, nothing = (letters("".join(p)) for p in (prompt, negative_prompt))
        x = torch.randn(1, 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            answers = [
                self.net([x[0]], ids, 6 + len(ids), torch.full((6,), float(t)))[0][0][None] for ids in ((told, nothing) if guidance_scale > 1 else (told,))
            ]
            out = answers[0] if len(answers) == 1 else answers[1] + guidance_scale * (answers[0] - answers[1])
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def test_a_network_that_takes_one_sample_is_called_for_each() -> None:
    teacher = Teacher(made(PackedPipe, PackedNet))
    assert not teacher.batched and teacher.denoiser.call.alone and teacher.sample_shape == (6, 4)
    assert teacher.reproduce(4) <= 1e-6 and teacher.reproduce(4, 3.0) <= 1e-6
    condition = teacher.condition(["a cat", "two"])
    x, t = torch.randn(2, 6, 4), torch.tensor([0.3, 0.8])
    both = teacher.denoiser.predict(x, t, condition, ["inner"])
    for i in range(2):
        one = teacher.denoiser.predict(x[i : i + 1], t[i : i + 1], condition[i : i + 1], ["inner"])
        assert torch.equal(both.value[i], one.value[0]) and torch.equal(both.features["inner"][i], one.features["inner"][0])
    assert both.features["inner"].shape == teacher.denoiser.features(x, t, condition, ["inner"])["inner"].shape == (2, 6, 8)
    assert teacher.guided(3.0)(x, t, condition).shape == (2, 6, 4)


class RaggedNet(Net):
    def forward(self, x: Tensor, t: Tensor, words: Tensor, return_dict: bool = True) -> Any:
        return (self.rows(x, t, words.float().mean(1)[:, None, None]),)


class RaggedPipe(Pipe):
    """Prompts of one length share a call."""

    @torch.no_grad()
    def __call__(self, prompt: Any, num_inference_steps: int = 20, generator: Any = None) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words, x = torch.stack([letters(p) for p in prompts]), torch.randn(len(prompts), 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.net(x, t.expand(len(x)), words)[0], t, x, return_dict=False)[0]
        return x


def test_prompts_of_different_lengths_are_computed_one_by_one() -> None:
    from distill.denoiser import cat

    teacher = Teacher(made(RaggedPipe, RaggedNet))
    denoiser = teacher.denoiser
    assert teacher.batched and not denoiser.call.alone
    short, long = teacher.condition(["cat"]), teacher.condition(["a long one"])
    x, t = torch.randn(2, 6, 4), torch.tensor([0.3, 0.8])
    assert denoiser.call.apart(cat([short, long]).values) and not denoiser.call.apart(cat([short, short]).values)
    wanted = torch.cat([denoiser(x[:1], t[:1], short), denoiser(x[1:], t[1:], long)])
    assert torch.equal(denoiser(x, t, cat([short, long])), wanted)
    assert takes_several(denoiser, x[:1], t[:1], short, short)


# -- a state in parts ---------------------------------------------------------------------------------------------------


class PartsNet(Net):
    """Takes a picture and an embedding, and answers with both and a third thing."""

    def forward(self, picture: Tensor, embedding: Tensor, words: Tensor, t: Tensor) -> Any:
        told = words.mean(1)[:, None, None]
        return self.rows(picture, t, told), self.rows(embedding, t, told), words


class PartsPipe(Pipe):
    """The scheduler's sample is one flat row; the null condition is noise, new at every step."""

    @torch.no_grad()
    def __call__(self, prompt: Any, guidance_scale: float = 2.0, num_inference_steps: int = 20, generator: Any = None) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words = torch.stack([letters(f"{p:9.9}").float() for p in prompts])
        x = torch.randn(len(prompts), 28, generator=generator)

        def answer(told: Tensor, t: Tensor) -> Tensor:
            picture, embedding, _ = self.net(x[:, :24].reshape(-1, 6, 4), x[:, 24:].reshape(-1, 1, 4), told, t)
            return torch.cat([picture.flatten(1), embedding.flatten(1)], 1)

        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            out = answer(words, t)
            if guidance_scale > 1:
                out = guidance_scale * out + (1 - guidance_scale) * answer(torch.randn(words.shape, generator=generator), t)
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def test_a_state_in_parts_is_found_and_put_together_again() -> None:
    teacher = Teacher(made(PartsPipe, PartsNet))
    call = teacher.denoiser.call
    assert teacher.sample_shape == (28,) and {call.state, *call.others} == {"picture", "embedding"} and call.gathered
    x = torch.arange(56.0).reshape(2, 28)
    told = call.arguments(x, torch.tensor([1.0, 2.0]), teacher.condition(["a", "b"]).values, torch.float32)
    torch.testing.assert_close(told["picture"], x[:, :24].reshape(2, 6, 4))
    torch.testing.assert_close(told["embedding"], x[:, 24:].reshape(2, 1, 4))
    assert teacher.check() == 0 and teacher.reproduce(4) <= 1e-6
    assert teacher.guidance is not None and teacher.guidance.conditional == 0
    assert teacher.reproduce(4, 3.0) <= 1e-6  # with the null condition of each step, though it is another at each


class TwoStates(PartsPipe):
    """Each part is stepped by a scheduler of its own."""

    @torch.no_grad()
    def __call__(
        self, prompt: Any, guidance_scale: float = 2.0, negative_prompt: Any = "", num_inference_steps: int = 20, generator: Any = None,
    ) -> Tensor:
        def told(given: Any) -> Tensor:
            return torch.stack([letters(f"{p:9.9}").float() for p in ([given] if isinstance(given, str) else given)])

        words, nothing = told(prompt), told(negative_prompt)
        x, y = (torch.randn(len(words), n, 4, generator=generator) for n in (6, 2))
        other = copy.deepcopy(self.scheduler)
        self.scheduler.set_timesteps(num_inference_steps)
        other.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            pictures, sounds, _ = self.net(x, y, words, t)
            if guidance_scale > 1:
                null = self.net(x, y, nothing, t)
                pictures, sounds = (n + guidance_scale * (c - n) for c, n in ((pictures, null[0]), (sounds, null[1])))
            x = self.scheduler.step(pictures, t, x, return_dict=False)[0]
            y = other.step(sounds, t, y, return_dict=False)[0]
        return x


def test_two_states_are_one_in_parts() -> None:
    teacher = Teacher(made(TwoStates, PartsNet))
    assert teacher.sample_shape == (32,) and {teacher.denoiser.call.state, *teacher.denoiser.call.others} == {"picture", "embedding"}
    assert teacher.guidance is not None and teacher.guidance.calls == 2
    assert teacher.check() == 0 and teacher.reproduce(4) <= 1e-6 and teacher.reproduce(4, 3.0) <= 1e-6


# -- other calls, other steps -------------------------------------------------------------------------------------------


class LookedInto(RaggedNet):
    """Leaves what it computed where a pipeline can read it."""

    maps: list[Tensor]

    def rows(self, x: Tensor, t: Tensor, told: Tensor) -> Tensor:
        answer = super().rows(x, t, told)
        self.maps.append(answer)
        return answer


class LookingPipe(Pipe):
    """Calls its network once for the sake of what happens inside, then again for guidance."""

    @torch.no_grad()
    def __call__(
        self, prompt: Any, negative_prompt: Any = "", guidance_scale: float = 2.0, num_inference_steps: int = 20, generator: Any = None,
    ) -> Tensor:
        told, nothing = (letters(f"{p if isinstance(p, str) else p[0]:9.9}")[None] for p in (prompt, negative_prompt))
        x = torch.randn(1, 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            self.net.maps = []
            self.net(x, t.expand(1), told)
            assert self.net.maps[0].shape == x.shape
            if guidance_scale > 1:
                null, cond = self.net(torch.cat([x, x]), t.expand(2), torch.cat([nothing, told]))[0].chunk(2)
                out = null + guidance_scale * (cond - null)
            else:
                out = self.net(x, t.expand(1), told)[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def test_a_pipeline_that_looks_inside_its_network_sees_it_computed() -> None:
    teacher = Teacher(made(LookingPipe, LookedInto))
    assert teacher.looks_inside and not Teacher(made(RaggedPipe, RaggedNet)).looks_inside
    assert teacher.guidance is not None and (teacher.guidance.skipped, teacher.guidance.calls, teacher.guidance.copies) == (1, 1, 2)
    condition = teacher.condition(["a cat"])
    assert condition.null is not None and not torch.equal(condition.values["words"], condition.null["words"])  # type: ignore[arg-type]
    assert teacher.reproduce(4) <= 1e-6 and teacher.reproduce(4, 3.0) <= 1e-6


class GuidedByComponent(DiffusionPipeline):
    """The scale of its guidance belongs to a component."""

    def __init__(self, net: nn.Module, scheduler: Any, guider: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler, guider=guider)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, prompt: Any, negative_prompt: Any = "", num_inference_steps: int = 20, generator: Any = None) -> Tensor:
        told, nothing = (torch.stack([letters(f"{q:9.9}") for q in ([p] if isinstance(p, str) else p)]) for p in (prompt, negative_prompt))
        x = torch.randn(len(told), 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            self.guider.set_state(step=i, num_inference_steps=num_inference_steps, timestep=t)
            states = self.guider.prepare_inputs({"words": (told, nothing)})
            for state in states:
                state.noise_pred = self.net(x, t.expand(len(x)), state.words)[0]
            x = self.scheduler.step(self.guider(states)[0], t, x, return_dict=False)[0]
        return x


def test_guidance_that_belongs_to_a_component() -> None:
    torch.manual_seed(0)
    guider = ClassifierFreeGuidance(guidance_scale=5.0)
    teacher = Teacher(GuidedByComponent(RaggedNet(), DDIMScheduler(clip_sample=False), guider))
    assert teacher.guidance is not None and (teacher.guidance.argument, teacher.guidance.rule) == ("guider.guidance_scale", "plain")
    assert teacher.reproduce(4) <= 1e-6 and teacher.reproduce(4, 3.0) <= 1e-6
    assert guider.guidance_scale == 5.0  # as the user has set it
    method = DMD2(guidance_scale=3.0)
    roles, _ = build_roles(teacher, method.roles)
    exported = assemble(Student(teacher, roles.student, method.sampler()), roles.student.backbone, teacher.pipeline.scheduler)
    assert exported.guider.guidance_scale == exported.guider.config.guidance_scale == 1.0  # it is in the student's weights


class WindowPipe(Pipe):
    """Several steps at once, of the scheduler's own method for that."""

    @torch.no_grad()
    def __call__(self, prompt: Any, parallel: int = 2, num_inference_steps: int = 20, generator: Any = None) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words, x = torch.stack([letters(f"{p:9.9}") for p in prompts]), torch.randn(len(prompts), 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for window in self.scheduler.timesteps.split(parallel):
            many, times = x.repeat(len(window), 1, 1), window.repeat_interleave(len(x))
            out = self.net(many, times, words.repeat(len(window), 1))[0]
            x = self.scheduler.batch_step_no_noise(out, times, many)[-len(x) :]
        return x


def test_steps_by_another_method_of_the_scheduler() -> None:
    assert stepping_methods(DDIMParallelScheduler) == ["batch_step_no_noise", "step"]
    with pytest.raises(UserError, match=r"several steps at once \(timesteps .*Override\(call=…\)"):
        Teacher(made(WindowPipe, RaggedNet, DDIMParallelScheduler))
    teacher = Teacher(made(WindowPipe, RaggedNet, DDIMParallelScheduler), override=Override(call={"parallel": 1}))
    recording = teacher._runner.run(["a cat"], {}, stop=after_steps(2))
    assert [s.method for s in recording.steps] == ["batch_step_no_noise"] * 2
    assert torch.equal(recording.steps[1].sample, recording.steps[0].result)
    assert teacher.check() == 0 and teacher.reproduce(4) <= 1e-6


class TokenScheduler(DDIMScheduler):
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:  # type: ignore[override]
        return (model_output.argmax(-1),)


class TokenPipe(Pipe):
    @torch.no_grad()
    def __call__(self, prompt: Any, num_inference_steps: int = 20, generator: Any = None) -> Tensor:
        x = torch.randint(0, 4, (1, 6), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.net(nn.functional.one_hot(x, 4).float(), t.expand(1), letters("a cat")[None])[0], t, x, return_dict=False)[0]
        return x


def test_a_state_of_tokens_is_refused_plainly() -> None:
    with pytest.raises(UserError, match="TokenPipe cannot be a teacher: its state is a grid of tokens.*discrete diffusion"):
        Teacher(made(TokenPipe, RaggedNet, TokenScheduler))


def test_attention_processors_are_put_back_when_a_recording_is_stopped() -> None:
    class Attending(RaggedNet):
        attn_processors: Any = {"layer": "its own"}

        def set_attn_processor(self, processors: Any) -> None:
            self.attn_processors = processors

    class Replacing(RaggedPipe):
        @torch.no_grad()
        def __call__(self, prompt: Any, num_inference_steps: int = 20, generator: Any = None) -> Tensor:
            self.net.set_attn_processor({"layer": "another"})
            return super().__call__(prompt, num_inference_steps, generator)

    pipeline = made(Replacing, Attending)
    Teacher(pipeline)
    assert pipeline.net.attn_processors == {"layer": "its own"}


def test_numbers_as_keys_stay_numbers() -> None:
    nested = {"samples": {2: torch.ones(1), 5: [torch.zeros(2)]}, "names": {"a": torch.ones(3)}}
    flat = flatten(nested)
    assert set(flat) == {"samples{2}", "samples{5}[0]", "names.a"}
    back = unflatten(flat)
    assert list(back["samples"]) == [2, 5] and torch.equal(back["samples"][5][0], torch.zeros(2)) and list(back["names"]) == ["a"]


def test_nan_is_no_agreement() -> None:
    teacher = Teacher(made(RaggedPipe, RaggedNet))
    teacher.backbone.outer.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match="differs from its backbone by nan"):
        teacher.check(float("inf"))


def test_a_scheduler_needs_no_method_called_step() -> None:
    class Predicting(DDIMScheduler):
        step = None  # type: ignore[assignment]

        def step_pred(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
            return sample - model_output

    pipeline = made(RaggedPipe, RaggedNet)
    pipeline.scheduler = Predicting(clip_sample=False)
    assert schedulers(pipeline) == [Predicting] and stepping_methods(Predicting) == ["step_pred"]
