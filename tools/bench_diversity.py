"""Which modes of an unbalanced mixture a distilled student keeps, by method: exact teacher, equal cost, several seeds.

    python tools/bench_diversity.py --jobs 2 --out runs/diversity --markdown runs/diversity/table.md --figure docs/diversity.png

One folder holds one ``--start``.

The teacher is the exact denoiser of eight Gaussians in two dimensions, their weights from 0.02 to 0.30; student and critic are small
networks. All methods have the same start, learning rates, batch and number of student updates; methods of several steps have fewer
critic updates, so that an update costs as many forward passes, of one sample each, as in the table (those of the discriminator,
which sees x_t and t, are not counted). A run that is finished is skipped when
the tool is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.analytic import GaussianMixture, MLPDenoiser
from distill.denoiser import Condition
from distill.evaluate.frechet import density_coverage, precision_recall
from distill.losses.adversarial import Discriminator
from distill.methods import available
from distill.methods.base import Batch, Method
from distill.roles import Roles
from distill.sampling import Sampler, renoise_sample, uniform_ladder
from distill.schedule import CosineVP
from distill.verify.core import descend, train
from distill.verify.dmd2 import mode_masses

WEIGHTS = (0.30, 0.02, 0.14, 0.05, 0.20, 0.03, 0.16, 0.10)  #: of the modes, counterclockwise from the right
RADIUS, STD = 2.0, 0.2
DATA_STD = 1.4  #: of the mixture, about
UPDATES, BATCH, WIDTH, SAMPLES = 400, 256, 64, 2000
START_STEPS = 2000  #: of fitting the network that student and critic start from
RATES = {"student": 3e-3, "critic": 6e-3, "discriminator": 3e-3}

START = "start.safetensors"
#: what student and critic are at first: the mixture's own denoiser, as in practice; or one that has lost the three modes on the left
#: (0.28 of the mass), with which it shows who finds modes again that a student does not have
STARTS = {"whole": WEIGHTS, "lost": tuple(0.0 if i in (3, 4, 5) else w for i, w in enumerate(WEIGHTS))}
KEPT = 0.25  #: a mode counts as covered with this share of its weight, within three of its standard deviations

GAN = {"weight": 0.1, "features": "teacher", "layers": ["state"]}
RATIO_ONLY = GAN | {"weight": 1e-30}  #: the discriminator gives the density ratio and nothing else
LOW = (0.02, 0.4)
COMMON = {"score_times": (0.02, 0.98), "critic_times": (0.01, 0.99)}
REFERENCE = "the mixture itself"  #: another sample of it: what the metrics can reach
UNTRAINED = "the start, 4 DDIM steps"  #: of the network that all start from
#: name → settings of its method. A method that is not there is left out: the list may be ahead of the package.
METHODS: dict[str, dict[str, Any]] = {
    "DMD2: reverse KL": {"name": "dmd2", "critic_steps": 4},
    "DMD2: reverse KL, GAN": {"name": "dmd2", "critic_steps": 4, "gan": GAN},
    "f-distill: Jensen–Shannon": {"name": "f_distill", "critic_steps": 4, "gan": RATIO_ONLY},
    "f-distill: forward KL": {"name": "f_distill", "divergence": "forward_kl", "critic_steps": 4, "gan": RATIO_ONLY},
    "EL: reverse KL, embedding loss": {"name": "el", "critic_steps": 4, "terms": [{"kind": "embedding"}]},
    "DMD2, 4 steps": {"name": "dmd2", "steps": 4, "critic_steps": 2},
    "TDM, 2 steps": {"name": "tdm", "steps": 2, "critic_steps": 3, "own_ranges": True},
    "TDM, 4 steps": {"name": "tdm", "steps": 4, "critic_steps": 2, "own_ranges": True},
    # The same with little noise: through much of it every mode is seen from everywhere, whatever the divergence.
    "DMD2: reverse KL, t ≤ 0.4": {"name": "dmd2", "critic_steps": 4, "score_times": LOW},
    "DMD2: reverse KL, GAN, t ≤ 0.4": {"name": "dmd2", "critic_steps": 4, "score_times": LOW, "gan": GAN},
    "f-distill: forward KL, t ≤ 0.4": {"name": "f_distill", "divergence": "forward_kl", "critic_steps": 4, "score_times": LOW, "gan": RATIO_ONLY},
    "EL: reverse KL, embedding loss, t ≤ 0.4": {"name": "el", "critic_steps": 4, "score_times": LOW, "terms": [{"kind": "embedding"}]},
    "Phased DMD, 4 steps": {"name": "phased_dmd", "steps": 4, "critic_steps": 2},
}


def mixture(weights: Sequence[float] = WEIGHTS) -> GaussianMixture:
    """The teacher."""
    angle = torch.arange(len(WEIGHTS)) * (2 * math.pi / len(WEIGHTS))
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(CosineVP(), means, torch.full((len(WEIGHTS), 1), STD), torch.tensor(weights))


# -- one run ------------------------------------------------------------------------------------------------------------


def fitted(file: Path, weights: Sequence[float]) -> None:
    """Fit a network to the denoiser of a mixture, and write it: what student and critic start from. Its one-step samples all lie
    near the mixture's mean, which is what a denoiser makes of noise alone."""
    if file.is_file():
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = mixture(weights)
    network = MLPDenoiser(teacher.schedule, 2, WIDTH, data_std=DATA_STD)

    def loss() -> Tensor:
        t = torch.rand(2 * BATCH, dtype=torch.float64)
        x_t = teacher.schedule.add_noise(teacher.sample(2 * BATCH), torch.randn(2 * BATCH, 2), t)
        return (network(x_t, t) - teacher(x_t, t)).square().mean()

    descend(network.parameters(), loss, START_STEPS, 5e-3)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), file)


def run(name: str, seed: int, result: Path) -> None:
    """Train and measure one method, and write its numbers; nothing to do where they are there."""
    if result.is_file():
        return
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    teacher, before, passes = mixture(), time.process_time(), Counter[str]()
    if name == REFERENCE:
        made = teacher.sample(SAMPLES)
    else:
        start = load_file(result.parents[1] / START)
        made = sampled(start, Sampler(uniform_ladder(4), 4, gamma=0.0)) if name == UNTRAINED else trained(METHODS[name], start, teacher, passes)
    numbers = measured(teacher, made) | {f"passes/{role}": n / UPDATES / BATCH for role, n in passes.items()}
    numbers["cpu_seconds"] = time.process_time() - before
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(numbers | {"samples": [[round(v, 2) for v in x] for x in made.tolist()]}) + "\n", encoding="utf-8")


def trained(settings: dict[str, Any], start: dict[str, Tensor], teacher: GaussianMixture, passes: Counter[str]) -> Tensor:
    """(SAMPLES, 2) samples of a student after UPDATES updates; forward passes of samples are counted by role."""
    method: Method = available()[settings["name"]].model_validate(COMMON | settings)
    student, critic = (MLPDenoiser(teacher.schedule, 2, WIDTH, data_std=DATA_STD) for _ in range(2))
    student.load_state_dict(start)
    critic.load_state_dict(start)
    discriminator = Discriminator({"state": (3,)}, hidden=WIDTH) if method.discriminator_features() else None
    roles = Roles(teacher, student, critic, discriminator=discriminator, state=method.initial_state())
    teacher.features = lambda x_t, t, condition, names: dict.fromkeys(names, torch.cat([x_t, t[:, None].to(x_t)], 1))  # type: ignore[method-assign] # no pass
    for role, network in {"teacher": teacher, "student": student, "critic": critic}.items():
        network.predict = counting(network.predict, role, passes)  # type: ignore[method-assign]
    rates = {role: rate for role, rate in RATES.items() if role != "discriminator" or discriminator is not None}

    def draw(step: int) -> Batch:
        return Batch(torch.randn(BATCH, 2), Condition(), teacher.sample(BATCH))

    averaged = train(method, roles, draw, UPDATES, rates, betas=(0.0, 0.99), average=0.99)
    return sampled({n: p for (n, _), p in zip(student.named_parameters(), averaged, strict=True)}, method.sampler())


@torch.no_grad()
def sampled(weights: dict[str, Tensor], sampler: Sampler) -> Tensor:
    """(SAMPLES, 2) samples of the network with these weights."""
    network = MLPDenoiser(CosineVP(), 2, WIDTH, data_std=DATA_STD)
    network.load_state_dict(weights)
    return renoise_sample(network, sampler.ladder(), torch.randn(SAMPLES, 2), None, gamma=sampler.gamma)


def counting(call: Callable[..., Any], role: str, passes: Counter[str]) -> Callable[..., Any]:
    def counted(x_t: Tensor, *rest: Any, **more: Any) -> Any:
        passes[role] += len(x_t)
        return call(x_t, *rest, **more)

    return counted


def measured(teacher: GaussianMixture, made: Tensor) -> dict[str, float]:
    """Modes covered, distance of their shares to the weights, and the metrics of ``distill eval`` against as many real samples."""
    real = teacher.sample(len(made))
    near = torch.cdist(made.double(), teacher.means).min(1).values < 3 * STD
    shares, weights = mode_masses(teacher, made), torch.tensor(WEIGHTS)
    kept = mode_masses(teacher, made[near]) * near.double().mean()
    (precision, recall), (density, coverage) = precision_recall(real, made), density_coverage(real, made)
    return {
        "modes": float((kept >= KEPT * weights).sum()), "tv": float(0.5 * (shares - weights).abs().sum()), "outside": float(1 - near.double().mean()),
        "precision": precision, "recall": recall, "density": density, "coverage": coverage,
    } | {f"share/{i}": float(s) for i, s in enumerate(shares)}  # fmt: skip


# -- all of them --------------------------------------------------------------------------------------------------------

COLUMNS = {  #: title → (key, digits)
    "modes of 8 ↑": ("modes", 1), "TV ↓": ("tv", 3), "outside ↓": ("outside", 3), "precision ↑": ("precision", 3), "recall ↑": ("recall", 3),
    "density ↑": ("density", 3), "coverage ↑": ("coverage", 3), "passes": ("passes", 1), "CPU s": ("cpu_seconds", 0),
}


def summarize(out: Path, names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per method that has results: mean and standard deviation over its seeds."""
    rows = []
    for name in names:
        found = [json.loads(f.read_text(encoding="utf-8")) for s in seeds if (f := place(out, name, s)).is_file()]
        for each in found:
            each.pop("samples")
            each["passes"] = sum(v for k, v in each.items() if k.startswith("passes/"))
        if found:
            values = {key: [f.get(key, 0.0) for f in found] for key in found[0]}
            spread = {k: statistics.stdev(v) if len(v) > 1 else 0.0 for k, v in values.items()}
            rows.append({"name": name, "seeds": len(found)} | {k: {"mean": statistics.fmean(v), "sd": spread[k]} for k, v in values.items()})
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| method | seeds | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    for row in rows:
        cells = [row["name"], str(row["seeds"])]
        for key, digits in COLUMNS.values():
            spread = "" if key in ("passes", "cpu_seconds") or row["seeds"] < 2 else f" ± {row[key]['sd']:.{digits}f}"
            cells.append(f"{row[key]['mean']:.{digits}f}{spread}" if key != "passes" or row[key]["mean"] else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def place(out: Path, name: str, seed: int) -> Path:
    """Where a run's numbers are."""
    return out / "".join(c if c.isalnum() else "-" for c in name) / f"seed-{seed}.json"


def draw(out: Path, names: Sequence[str], seed: int, size: int = 220) -> Any:
    """The samples of one seed by method, side by side: a PIL image. Circles are the modes, at three deviations."""
    from PIL import Image, ImageDraw

    across = 4
    picture = Image.new("RGB", (across * size, -(-len(names) // across) * (size + 16)), "white")
    pen, scale = ImageDraw.Draw(picture), size / 6

    def at(index: int, x: Sequence[float]) -> tuple[float, float]:
        return (index % across + 0.5) * size + x[0] * scale, (index // across) * (size + 16) + 16 + size / 2 - x[1] * scale

    for index, name in enumerate(names):
        pen.text((index % across * size + 6, index // across * (size + 16) + 4), name.replace("–", "-").replace("≤", "<="), fill="black")
        for x in json.loads(place(out, name, seed).read_text(encoding="utf-8"))["samples"][:1000]:
            a, b = at(index, x)
            if abs(a - at(index, (0, 0))[0]) < size / 2 and abs(b - at(index, (0, 0))[1]) < size / 2:
                pen.rectangle((a, b, a + 1, b + 1), fill=(31, 119, 180))
        for mean in mixture().means.tolist():
            (a, b), r = at(index, mean), 3 * STD * scale
            pen.ellipse((a - r, b - r, a + r, b + r), outline=(160, 160, 160))
    return picture.quantize(16)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="names in the tool's table; all that there are if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--start", choices=STARTS, default="lost", help="what the student is at first")
    parser.add_argument("--out", type=Path, default=Path("runs/diversity"))
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--figure", type=Path, help="write a picture of the first seed's samples there")
    given = parser.parse_args()
    if unknown := set(given.methods or ()) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))} in the table; there are: {', '.join(METHODS)}")
    there = [name for name, settings in METHODS.items() if settings["name"] in available()]
    names = [REFERENCE, UNTRAINED, *(n for n in there if given.methods is None or n in given.methods)]
    fitted(given.out / START, STARTS[given.start])
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        runs = {(n, s): pool.submit(run, n, s, place(given.out, n, s)) for s in given.seeds for n in names}
    failed = {key: error for key, future in runs.items() if (error := future.exception()) is not None}
    for (name, seed), error in failed.items():
        print(f"{name}, seed {seed}: {error}", file=sys.stderr)
    rows = summarize(given.out, names, given.seeds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    if given.markdown:
        given.markdown.write_text(table, encoding="utf-8")
    if given.figure:
        draw(given.out, [n for n in names if place(given.out, n, given.seeds[0]).is_file()], given.seeds[0]).save(given.figure, optimize=True)
    print(table, end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
