"""Distances with known values, metrics on real images, reproducible generation, tables and the report."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_stable_diffusion, tiny_unet2d

from distill.config import load_config
from distill.data.digits import load_digits
from distill.errors import UserError
from distill.evaluate.frechet import density_coverage, frechet_distance, kernel_distance, precision_recall
from distill.evaluate.generate import Images, default_inputs, generate
from distill.evaluate.grid import comparison_grid, plain_grid
from distill.evaluate.metrics import Context, check_metric, measure
from distill.evaluate.report import write_report
from distill.evaluate.run import Entry, evaluate
from distill.evaluate.table import cells, markdown
from distill.loading import conditioned_on, load_pipeline


def exact(mean: list[float], factor: list[list[float]], count: int = 4000) -> torch.Tensor:
    """Samples whose mean and unbiased covariance are exactly the stated ones."""
    x = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return x @ torch.tensor(factor, dtype=torch.float64).T + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_closed_form() -> None:
    """Commuting covariances: |Δμ|² + Σ (σ_a − σ_b)²; also where one is singular."""
    a, b = exact([1.0, 0.0], [[2.0, 0.0], [0.0, 1.0]]), exact([0.0, 2.0], [[0.5, 0.0], [0.0, 3.0]])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1.5**2 + 2**2, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    flat = exact([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]) * torch.tensor([1.0, 0.0])
    assert frechet_distance(a, flat) == pytest.approx(1 + 1 + 1, rel=1e-6)


def test_frechet_distance_of_rotated_covariances() -> None:
    a, b = exact([0, 0], [[2.0, 0.0], [1.0, 1.0]]), exact([0, 0], [[1.0, 0.0], [-0.5, 1.5]])
    cov_a, cov_b = (np.cov(x.numpy().T) for x in (a, b))
    from scipy.linalg import sqrtm

    expected = np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_kernel_distance_is_unbiased() -> None:
    torch.manual_seed(0)
    same = kernel_distance(torch.randn(3000, 8), torch.randn(3000, 8), subsets=50, subset_size=500)
    assert abs(same.mean) < 3 * same.std / 7
    assert kernel_distance(torch.randn(3000, 8), torch.randn(3000, 8) + 0.5, subsets=20, subset_size=500).mean > 0.1


def test_precision_recall_density_coverage() -> None:
    torch.manual_seed(0)
    real, inside = torch.randn(800, 2), torch.randn(800, 2) * 0.1
    precision, recall = precision_recall(real, inside)
    assert precision > 0.98 and recall < 0.2
    density, coverage = density_coverage(real, torch.randn(800, 2))
    assert density == pytest.approx(1, abs=0.15) and coverage > 0.9


def digits(split: str = "heldout") -> Images:
    images, labels = load_digits(split)  # type: ignore[arg-type]
    return Images(images / 2 + 0.5, labels.tolist(), 1.0, 1.0)


def test_metrics_of_real_digits() -> None:
    numbers = measure(digits(), ["fd-digits", "accuracy", "precision", "kid"], Context())
    assert numbers["accuracy"] >= 0.97  # type: ignore[operator]
    assert numbers["fd_digits"] == pytest.approx(0.53, abs=0.02) and numbers["fd_digits_heldout"] == pytest.approx(0, abs=1e-6)
    assert abs(float(numbers["kid"])) < 0.05 and len(str(numbers["fd_digits_features_sha256"])) == 64
    noise = Images(torch.rand(400, 1, 8, 8), [i % 10 for i in range(400)], 1.0, 1.0)
    bad = measure(noise, ["fd-digits", "accuracy"], Context())
    assert bad["fd_digits"] > 20 and bad["accuracy"] < 0.4  # type: ignore[operator]


def test_metrics_say_what_they_need() -> None:
    with pytest.raises(UserError, match="1×8×8 images"):
        measure(Images(torch.rand(4, 3, 16, 16), [0] * 4, 1.0, 1.0), ["fd-digits"], Context())
    with pytest.raises(UserError, match="not class-conditional"):
        measure(Images(torch.rand(4, 1, 8, 8), [None] * 4, 1.0, 1.0), ["accuracy"], Context())
    with pytest.raises(UserError, match="takes no prompts"):
        measure(digits(), ["clip-score"], Context())
    with pytest.raises(UserError, match="did you mean 'coverage'"):
        check_metric("covrage")
    with pytest.raises(UserError, match="metric nowhere:x"):
        check_metric("nowhere:x")
    assert check_metric("math:sqrt")(4.0) == 2.0  # type: ignore[arg-type, call-arg]


def test_what_cannot_be_measured_is_refused() -> None:
    few = Images(torch.rand(1, 1, 8, 8), [0], 1.0, 1.0)
    for name in ("fd-digits", "kid", "precision", "coverage"):
        with pytest.raises(UserError, match="1 samples are too few"):
            measure(few, [name], Context())
    diverged = Images(torch.rand(9, 1, 8, 8), [0] * 9, 1.0, 1.0)
    diverged.images[2, 0, 3, 3] = float("nan")
    with pytest.raises(UserError, match="1 of 9 images hold NaN"):
        measure(diverged, ["accuracy"], Context())


def test_refused_before_sampling(tmp_path: Path) -> None:
    def refused(pipeline: object, metric: str, message: str, reference: Path | None = None) -> None:
        with pytest.raises(UserError, match=message):
            evaluate([Entry("x", pipeline)], [metric], samples=10**6, prompts=["a cat"], context=Context(reference))

    refused(tiny_stable_diffusion(), "fd-digits", "StableDiffusionPipeline makes other images")
    refused(tiny_unet2d(None), "accuracy", "not class-conditional")
    refused(tiny_unet2d(), "clip-score", "takes no prompts")
    refused(tiny_unet2d(), "fid", "--reference FOLDER")
    refused(tiny_unet2d(), "fid", "holds no images", tmp_path)
    with pytest.raises(UserError, match="--reference FOLDER"):
        load_config("quickstart", ["evaluate.metrics=[fid]"])


def test_generation_does_not_depend_on_the_batch_size() -> None:
    pipeline = tiny_unet2d()
    inputs = default_inputs(pipeline, 7)
    assert inputs == [0, 1, 2, 3, 4, 5, 6]
    a = generate(pipeline, inputs, steps=2, batch_size=7, seed=5)
    b = generate(pipeline, inputs, steps=2, batch_size=3, seed=5)
    torch.testing.assert_close(a.images, b.images, atol=1e-5, rtol=0)
    assert a.images.shape == (7, 1, 8, 8) and 0 <= a.images.min() and a.images.max() <= 1 and a.images_per_second > 0
    assert (generate(pipeline, inputs, steps=2, seed=6).images - a.images).abs().max() > 1e-3


def test_seeds_share_no_noise() -> None:
    pipeline = tiny_unet2d(None)
    a, b = (generate(pipeline, [None] * 6, steps=1, seed=seed).images.flatten(1) for seed in (0, 1))
    assert torch.cdist(a, b).min() > 1e-2


class Slow:
    """A pipeline whose first call takes 0.5 s, as one that warms up does; 10 ms per image after that, on a clock of its own."""

    config: dict[str, int] = {}
    device = "cpu"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.clock = 0.0

    def perf_counter(self) -> float:
        return self.clock

    def __call__(self, batch_size: int, num_inference_steps: int = 7, generator: object = None, output_type: str = "np") -> SimpleNamespace:
        self.clock += 0.5 if not self.batches else 0.01 * batch_size
        self.batches.append(batch_size)
        return SimpleNamespace(images=np.zeros((batch_size, 8, 8, 1), dtype=np.float32))


def test_speed_leaves_out_the_first_batch_and_a_partial_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Slow()
    monkeypatch.setattr("distill.evaluate.generate.time", pipeline)
    images = generate(pipeline, [None] * 41, batch_size=20)
    assert pipeline.batches == [20, 20, 1] and images.images_per_second == pytest.approx(100) and images.seconds == pytest.approx(0.71)
    pipeline.batches.clear()
    assert generate(pipeline, [None] * 21, batch_size=20).images_per_second == pytest.approx(40)  # the only full one


def test_kinds_of_pipelines() -> None:
    assert conditioned_on(tiny_unet2d()) == "class_labels" and conditioned_on(tiny_unet2d(None)) is None
    pipeline = tiny_stable_diffusion()
    assert conditioned_on(pipeline) == "prompt" and default_inputs(pipeline, 3, ["a", "b"]) == ["a", "b", "a"]
    images = generate(pipeline, ["a cat"] * 2, steps=1, guidance_scale=1.0).images
    assert images.shape == (2, 3, 16, 16)


def test_rows() -> None:
    teacher = load_pipeline("assets/digits-teacher")
    rows = evaluate([Entry("teacher", teacher, 2), Entry("again", teacher, 1)], ["accuracy"], samples=60, batch_size=30)
    assert [r["steps"] for r in rows] == [2, 1] and rows[1]["speedup"] > 0 and 0 <= rows[0]["accuracy"] <= 1
    assert json.loads(json.dumps(rows)) == rows
    assert evaluate([Entry("by itself", teacher)], [], samples=1)[0]["steps"] == 50  # the pipeline's own default
    assert evaluate([Entry("slow", Slow())], [], samples=1)[0]["steps"] == 7  # the call's
    titles, body = cells([{"name": "x", "steps": 1, "sharpness": 1.25, "seed": 3, "device": "cpu"}, {"name": "y", "steps": 2}])
    assert titles == ["", "steps", "sharpness"] and body == [["x", "1", "1.25"], ["y", "2", "–"]]  # a metric of the user's own
    titles, body = cells(rows)
    assert titles[:2] == ["", "steps"] and body[0][0] == "teacher" and "| teacher | 2 |" in markdown(rows)


def test_grids(tmp_path: Path) -> None:
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.full((1, 8, 8), 0.5)])
    plain_grid(images, 2, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (8 * 2 + 3, 8 * 2 + 3) and picture.getpixel((0, 0)) == (0, 0, 0) and picture.getpixel((12, 1)) == (255, 255, 255)
        assert picture.getpixel((2, 14)) == (128, 128, 128)
    picture = comparison_grid([("teacher", images), ("student", images)], columns=3, cell=16)
    assert picture.size[0] == 2 * 12 + 3 * (16 + 3) - 3
    assert picture.getpixel((13, 12 + 22 + 3)) == (0, 0, 0) and picture.getpixel((12 + 19 + 3, 12 + 22 + 3)) == (255, 255, 255)


def test_report_is_self_contained(tmp_path: Path) -> None:
    lines = [{"step": i, "student/loss": 1 / (i + 1), "critic/grad_norm": 2.0} for i in range(30)]
    lines[7]["student/loss"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "stu')
    rows = [{"name": "teacher <b>", "steps": 50, "fd_digits": 0.1234}]
    picture = comparison_grid([("x", torch.rand(2, 1, 8, 8))], columns=2)
    text = write_report(tmp_path, "dmd2", rows, [("Samples", picture)], "teacher: {}", "pipe = …").read_text()
    assert "teacher &lt;b&gt;" in text and "0.123" in text and text.count("<polyline") == 4 and "data:image/png;base64," in text
    assert "nan" not in text.lower()
    assert "http" not in text and "<script" not in text
