"""A few-step student in the class of its teacher: `pipe(prompt)` is right with no further argument. Needs diffusers alone.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)  # runs this file
    image = pipe("a red apple").images[0]

The times that the student was trained for, its number of steps and its guidance are written below, whatever they are: no
stock scheduler has to know them. A student may consist of several networks, of which each step or each condition asks one, or be told where
each step ends, by an embedding of its own: they are components too. All else (prompts, sizes, LoRAs, offloading) is the stock class's own.
"""

import ast
import contextlib
import functools
import inspect
import json
import pathlib

import torch
from diffusers import ConfigMixin

# Written by the export: the classes that these extend, and the student's settings.
from diffusers import SchedulerMixin as StockScheduler
from diffusers import StableDiffusionPipeline as Stock
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

SETTINGS = {}
# End of what the export writes.

logger = logging.get_logger("few_step")


class FewStepScheduler(StockScheduler, ConfigMixin):
    """Sample at a fixed ladder of times, or at some of them, evenly chosen from the top:

        x0, eps = what the network says at the time t;   x_s = alpha_s x0 + sigma_s eps;   x_u = x_s with fresh noise up to u

    where u is the next time and s ≤ u a way point: clean data (all of the noise is fresh), u itself (none is), or between.

    Args:
        timesteps: the ladder as the network is told it, falling.
        alphas, sigmas: of x_t = alpha x0 + sigma noise at these times.
        way_alphas, way_sigmas: the same at the way point below each of them.
        prediction_type: "epsilon", "v_prediction", "f_prediction" (−v), "sample" or "flow_prediction" (noise − x0, where
            alpha = 1 − sigma).
        init_noise_sigma: standard deviation of the first state.
        data_scale: what the last x0 is multiplied by.
        sample_scale: a state of the pipeline's is so many times x_t.
        sign: -1 where the pipeline's time runs from noise to data, so that its velocities point the other way.
        tail: further timesteps at which the pipeline does not call its network.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        timesteps=(999,),
        alphas=(0.0,),
        sigmas=(1.0,),
        way_alphas=(1.0,),
        way_sigmas=(0.0,),
        prediction_type="epsilon",
        init_noise_sigma=1.0,
        data_scale=1.0,
        num_train_timesteps=1000,
        sample_scale=1.0,
        sign=1.0,
        tail=(),
    ):
        self.init_noise_sigma = init_noise_sigma
        self.generator = None  # the fresh noise's, for pipelines that hand none to `step`
        self.set_timesteps(len(timesteps))

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **others):
        """Choose the times of an n-step sample. Of timesteps or sigmas that a pipeline passes, only the number counts."""
        ladder = self.config.timesteps
        given = num_inference_steps or len(timesteps if timesteps is not None else sigmas)
        if not 1 <= given <= len(ladder):
            raise ValueError(f"this student samples in 1 to {len(ladder)} steps, not {given}")
        self.num_inference_steps = given
        self._chosen = [i * len(ladder) // given for i in range(given)]
        whole = self.config.prediction_type != "flow_prediction" and all(float(t).is_integer() for t in ladder)
        times = torch.tensor([*(ladder[i] for i in self._chosen), *self.config.tail], dtype=torch.float64)
        self.timesteps = times.to(device, torch.int64 if whole else torch.float32)
        self.sigmas = torch.tensor([*(self.config.sigmas[i] for i in self._chosen), 0.0])
        self._step_index = self._begin_index = None

    @property
    def step_index(self):
        return self._step_index

    @property
    def begin_index(self):
        return self._begin_index

    @property
    def place(self):
        """Where in the ladder the next step is."""
        step = self._step_index if self._step_index is not None else self._begin_index or 0
        return self._chosen[min(step, len(self._chosen) - 1)]

    @property
    def next_place(self):
        """Where the one after it is; None if there is none."""
        after = (self._step_index if self._step_index is not None else self._begin_index or 0) + 1
        return self._chosen[after] if after < len(self._chosen) else None

    def set_begin_index(self, begin_index=0):
        self._begin_index = begin_index

    def scale_model_input(self, sample, timestep=None):
        return sample

    def add_noise(self, original_samples, noise, timesteps):
        """x_t of given samples at one of the ladder's times, for pipelines that start from an image."""
        at = int((self.timesteps.cpu().double() - float(torch.as_tensor(timesteps).reshape(-1)[0])).abs().argmin())
        i = self._chosen[at]
        return self.config.alphas[i] * original_samples + self.config.sigmas[i] * noise

    def scale_noise(self, sample, timestep, noise):
        return self.add_noise(sample, noise, timestep)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, **others):
        """The state at the next time (after the last one: x0)."""
        if self._step_index is None:
            self._step_index = self._begin_index or 0
        config, now = self.config, self._chosen[self._step_index]
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64
        scale = config.sample_scale
        x, said = sample.to(dtype) / scale, model_output[:, : sample.shape[1]].to(dtype)  # a learned variance is left out
        said = said * config.sign / scale
        alpha, sigma = config.alphas[now], config.sigmas[now]
        if config.prediction_type == "epsilon":
            x0, eps = (x - sigma * said) / alpha, said
        elif config.prediction_type == "v_prediction":
            x0, eps = alpha * x - sigma * said, sigma * x + alpha * said
        elif config.prediction_type == "f_prediction":
            x0, eps = alpha * x + sigma * said, sigma * x - alpha * said
        elif config.prediction_type == "flow_prediction":
            x0, eps = x - sigma * said, x + (1 - sigma) * said
        else:
            x0, eps = said, (x - alpha * said) / sigma
        self._step_index += 1
        state = x0 * config.data_scale
        if self._step_index < self.num_inference_steps:
            after = self._chosen[self._step_index]
            way_alpha, way_sigma = config.way_alphas[after], config.way_sigmas[after]
            ratio = config.alphas[after] / way_alpha
            variance = config.sigmas[after] ** 2 - (ratio * way_sigma) ** 2
            state = ratio * (way_alpha * x0 + (way_sigma * eps if way_sigma else 0))
            if variance > 1e-12:
                generator = self.generator if generator is None else generator
                fresh = randn_tensor(x.shape, generator, x.device, torch.float32)
                state = state + variance**0.5 * fresh.to(dtype)
            state = state * scale
        state, denoised = state.to(sample.dtype), (x0 * config.data_scale).to(sample.dtype)
        return SchedulerOutput(prev_sample=state) if return_dict else (state, denoised)  # as LCMScheduler's

    def __len__(self):
        return self.config.num_train_timesteps


def vectors_of(value):
    """A condition as (batch, d): a class's number as it is, embeddings of tokens by their mean."""
    if isinstance(value, torch.Tensor):
        return value.float().reshape(len(value), -1, 1 if value.dim() == 1 else value.shape[-1]).mean(1)
    return torch.stack([entry.float().reshape(-1, entry.shape[-1]).mean(0) for entry in value])


def parts_of(vectors, axes, thresholds):
    """The part of the conditions that each lies in: split m lies between the parts below m and the others."""
    beyond = (vectors @ torch.tensor(axes).to(vectors).T > torch.tensor(thresholds).to(vectors)).tolist()
    parts = []
    for sides in beyond:
        low, high = 0, len(thresholds) + 1
        while high - low > 1:
            split = (low + high) // 2
            low, high = (split, high) if sides[split - 1] else (low, split)
        parts.append(low)
    return parts


def rows_of(value, rows, batch):
    """Some samples of all arguments that have a row or an entry for each."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {key: rows_of(v, rows, batch) for key, v in value.items()}
    if isinstance(value, list) and len(value) == batch and all(isinstance(v, torch.Tensor) for v in value):
        return [value[i] for i in rows]
    return type(value)(rows_of(v, rows, batch) for v in value) if isinstance(value, (list, tuple)) else value


def joined(answers, order):
    """The answers to parts of a batch as one, in the batch's order."""
    first = answers[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(answers)[order]
    if isinstance(first, dict):
        return type(first)(**{key: joined([a[key] for a in answers], order) for key in first})
    if isinstance(first, tuple):
        return tuple(joined(list(column), order) for column in zip(*answers, strict=True))
    if isinstance(first, list):
        entries = [entry for answer in answers for entry in answer]
        return [entries[i] for i in order]
    return first


class FewStepPipeline(Stock):
    """The stock pipeline, sampling as the student was trained to."""

    # A class attribute: two such files loaded in one process share their module's globals, not their classes.
    others = [*SETTINGS.get("experts", {}).get("others", ()), *([SETTINGS["end_time"]["name"]] if "end_time" in SETTINGS else ())]
    settings, source = SETTINGS, pathlib.Path(__file__).read_text(encoding="utf-8")

    @functools.wraps(Stock.__init__)
    def __init__(self, *args, **kwargs):
        others = {name: kwargs.pop(name) for name in self.others}
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        name = self.settings.get("component", "scheduler")
        # Before anything else: the stages of a cascade are pipelines of their own, made of these parts.
        given.arguments[name] = self.few_step_scheduler(given.arguments[name])
        super().__init__(*given.args, **given.kwargs)
        self.register_modules(**{name: self.few_step_scheduler(getattr(self, name))})  # some classes make one of their own
        self.register_modules(**others)
        for attribute, value in self.settings.get("attributes", {}).items():
            setattr(self, attribute, ast.literal_eval(value))

    # diffusers takes the components from here: the networks beside the stock class's one.
    _arguments = list(inspect.signature(Stock.__init__).parameters.values())
    _others = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in others]
    _last = len(_arguments) - (_arguments[-1].kind is inspect.Parameter.VAR_KEYWORD)
    __init__.__signature__ = inspect.Signature([*_arguments[:_last], *_others, *_arguments[_last:]])

    def few_step_scheduler(self, stock):
        """The student's scheduler in place of a stock one."""
        if hasattr(stock, "generator") or "scheduler" not in self.settings:
            return stock
        scheduler = FewStepScheduler(**self.settings["scheduler"])
        others = {k: v for k, v in stock.config.items() if k not in scheduler.config and not k.startswith("_")}
        scheduler.register_to_config(**others)  # pipelines read what they need of it
        scheduler.stock = stock
        return scheduler

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """As ever, with this file in the folder: it loads as this one did."""
        if push_to_hub:
            raise ValueError("pipe.push_to_hub(name) sends this file along, save_pretrained(push_to_hub=True) does not")
        name, folder = self.settings.get("component", "scheduler"), pathlib.Path(save_directory)
        ours = getattr(self, name)
        self.register_modules(**{name: ours.stock})  # diffusers loads classes of its own alone
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.register_modules(**{name: ours})
        (folder / "pipeline.py").write_text(self.source, encoding="utf-8")
        stock = type(self).__mro__[1]
        if not stock.__module__.startswith("diffusers."):
            beside = pathlib.Path(inspect.getfile(stock))
            (folder / beside.name).write_bytes(beside.read_bytes())
        index = folder / "model_index.json"
        facts = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": ["pipeline", "FewStepPipeline"]}
        index.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def on(cls, pipe):
        """This student's pipeline on the parts and the configuration of a loaded one: its teacher's, for a LoRA."""
        known = {**pipe.config, **pipe.components}
        return cls(**{name: known[name] for name in inspect.signature(cls.__init__).parameters if name in known})

    @functools.wraps(Stock.__call__)
    def __call__(self, *args, **kwargs):
        settings, stock = self.settings, super().__call__
        signature = inspect.signature(stock)
        given = signature.bind_partial(*args, **kwargs)
        negative = given.arguments.get("negative_prompt")
        if negative is not None and any([negative] if isinstance(negative, str) else negative):
            logger.warning("negative_prompt has no effect: this student samples without guidance")
        for name in settings.get("fixed", ()):
            if given.arguments.get(name, settings["call"][name]) != settings["call"][name]:
                logger.warning(f"{name} is {settings['call'][name]}: the teacher's guidance is part of this student's weights")
                given.arguments[name] = settings["call"][name]
        for name, value in settings.get("call", {}).items():
            if given.arguments.get(name) is None:
                given.arguments[name] = value
        getattr(self, settings.get("component", "scheduler")).generator = given.arguments.get("generator")
        ordered = inspect.BoundArguments(signature, {n: given.arguments[n] for n in signature.parameters if n in given.arguments})
        with self.experts_at_work(), self.ends_told():
            return stock(*ordered.args, **ordered.kwargs)

    @contextlib.contextmanager
    def experts_at_work(self):
        """Calls of the backbone go to the network whose step or whose condition it is."""
        told = self.settings.get("experts")
        if told is None:
            yield
            return
        backbone = getattr(self, told["component"])
        networks = [backbone, *(getattr(self, name) for name in told["others"])]
        hidden, own = backbone.__dict__.get("forward"), backbone.forward

        def ask(k, args, kwargs):
            return networks[k](*args, **kwargs) if k else own(*args, **kwargs)

        @functools.wraps(own)
        def forward(*args, **kwargs):
            if "steps" in told:
                scheduler = getattr(self, self.settings.get("component", "scheduler"))
                return ask(told["steps"][scheduler.place], args, kwargs)
            given = {**inspect.signature(own).bind_partial(*args, **kwargs).arguments, **kwargs}
            for key in told["argument"].split("."):
                given = given[key]
            chosen = parts_of(vectors_of(given), told["axes"], told["thresholds"])
            if len(set(chosen)) == 1:
                return ask(chosen[0], args, kwargs)
            rows = [[i for i, k in enumerate(chosen) if k == network] for network in sorted(set(chosen))]
            answers = [ask(chosen[r[0]], rows_of(args, r, len(chosen)), rows_of(kwargs, r, len(chosen))) for r in rows]
            order = [i for r in rows for i in r]
            return joined(answers, [order.index(i) for i in range(len(order))])

        backbone.forward = forward
        try:
            yield
        finally:
            if hidden is None:
                del backbone.forward
            else:
                backbone.forward = hidden

    @contextlib.contextmanager
    def ends_told(self):
        """The backbone is told where each step ends: at the next time's way point, the last one at clean data."""
        told = self.settings.get("end_time")
        if told is None:
            yield
            return
        embedding, backbone = getattr(self, told["name"]), getattr(self, told["component"])
        scheduler = getattr(self, self.settings.get("component", "scheduler"))
        hidden, own = backbone.__dict__.get("forward"), backbone.forward

        @functools.wraps(own)
        def forward(*args, **kwargs):
            after = scheduler.next_place
            way = told["times"][scheduler.place] - (0.0 if after is None else told["ways"][after])
            with embedding.using(embedding(torch.tensor([way], device=embedding.device))):
                return own(*args, **kwargs)

        handles, backbone.forward = embedding.attach(backbone), forward
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if hidden is None:
                del backbone.forward
            else:
                backbone.forward = hidden

    _parameters = inspect.signature(Stock.__call__).parameters.values()
    __call__.__signature__ = inspect.Signature(
        [p.replace(default=SETTINGS.get("call", {}).get(p.name, p.default)) for p in _parameters]
    )


del Stock  # diffusers wants one pipeline class in a file
