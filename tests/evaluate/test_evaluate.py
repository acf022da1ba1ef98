"""Distances with known values, metrics on real images, reproducible generation, tables and the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_stable_diffusion, tiny_unet2d

from distill.data.digits import load_digits
from distill.errors import UserError
from distill.evaluate.frechet import density_coverage, frechet_distance, kernel_distance, precision_recall
from distill.evaluate.generate import Images, conditioned_on, default_inputs, generate
from distill.evaluate.grid import comparison_grid, plain_grid
from distill.evaluate.metrics import Context, check_metric, measure
from distill.evaluate.report import write_report
from distill.evaluate.run import Entry, evaluate
from distill.evaluate.table import cells, markdown
from distill.loading import load_pipeline


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


def test_generation_does_not_depend_on_the_batch_size() -> None:
    pipeline = tiny_unet2d()
    inputs = default_inputs(pipeline, 7)
    assert inputs == [0, 1, 2, 3, 4, 5, 6]
    a = generate(pipeline, inputs, steps=2, batch_size=7, seed=5)
    b = generate(pipeline, inputs, steps=2, batch_size=3, seed=5)
    torch.testing.assert_close(a.images, b.images, atol=1e-5, rtol=0)
    assert a.images.shape == (7, 1, 8, 8) and 0 <= a.images.min() and a.images.max() <= 1 and a.images_per_second > 0
    assert (generate(pipeline, inputs, steps=2, seed=6).images - a.images).abs().max() > 1e-3


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
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "stu')
    rows = [{"name": "teacher <b>", "steps": 50, "fd_digits": 0.1234}]
    picture = comparison_grid([("x", torch.rand(2, 1, 8, 8))], columns=2)
    text = write_report(tmp_path, "dmd2", rows, [("Samples", picture)], "teacher: {}", "pipe = …").read_text()
    assert "teacher &lt;b&gt;" in text and "0.123" in text and text.count("<polyline") == 4 and "data:image/png;base64," in text
    assert "http" not in text and "<script" not in text
