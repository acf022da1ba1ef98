"""Distances between two sets of features: pure functions of (N, D) tensors, computed in float64.

    Fréchet      |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½)                         Heusel et al. 2017, arXiv 1706.08500
    kernel       MMD² with k(x, y) = (x·y / D + 1)³, unbiased                    Bińkowski et al. 2018, arXiv 1801.01401
    precision    share of b inside the k-NN balls of a, and recall the reverse   Kynkäänniemi 2019, arXiv 1904.06991
    density, coverage   the same balls counted so that outliers weigh less       Naeem et al. 2020, arXiv 2002.09797

Which network makes the features decides what the numbers mean; none of them may be compared across networks. The
Fréchet distance of finite samples is biased upwards by about 1/N, so compare only numbers of equal sample counts; the
kernel distance has no such bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """The two moments that a Fréchet distance sees."""

    mean: Tensor  #: (D,)
    covariance: Tensor  #: (D, D)


class KernelDistance(NamedTuple):
    """Mean and standard deviation over random subsets; the standard error of `mean` is smaller than `std`."""

    mean: float
    std: float


def moments(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance, in float64, of (N, D) features.

    Raises:
        ValueError: for fewer than two samples, or a tensor that is not (N, D), or values that are not finite.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with N ≥ 2, not {tuple(features.shape)}")
    features = features.detach().double()
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values")
    mean = features.mean(0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Tensor | Gaussian, b: Tensor | Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians of two feature sets (Heusel et al. 2017, eq. 6).

    tr (Σa Σb)^½ is computed as the sum of the singular values of Σa^½ Σb^½: only symmetric matrices are ever rooted, so
    nothing complex or spuriously negative appears, also when a covariance is singular.

    Args:
        a, b: (N, D) features, or their `moments`. Symmetric in a and b.
    """
    (mean_a, cov_a), (mean_b, cov_b) = (x if isinstance(x, Gaussian) else moments(x) for x in (a, b))
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KernelDistance:
    """KID: the unbiased squared MMD with the cubic polynomial kernel (Bińkowski et al. 2018, eq. 4 and section 4).

    Args:
        a, b: (N, D) and (M, D) features.
        subsets, subset_size: the estimate is averaged over `subsets` draws without replacement of
            min(subset_size, N, M) samples from each side. May be slightly negative for equal distributions.
        seed: of the draws.
    """
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError("the kernel distance needs two samples of each set")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    result = torch.stack(values)
    return KernelDistance(result.mean().item(), result.std(correction=0).item())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: share of fake samples within some real sample's k-NN ball; recall: the same with the roles exchanged.

    Kynkäänniemi et al. 2019, eqs. 1–2. Use equal sample counts on both sides: the balls shrink as samples are added.
    """
    distances = torch.cdist(real.detach().double(), fake.detach().double())
    precision = (distances <= nearest_radii(real, k)[:, None]).any(0)
    recall = (distances <= nearest_radii(fake, k)[None, :]).any(1)
    return precision.double().mean().item(), recall.double().mean().item()


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density: real k-NN balls that hold a fake sample, counted, over k; coverage: share of balls that hold one.

    Naeem et al. 2020, eqs. 4–5. Density is 1 in expectation for equal distributions and may exceed 1.
    """
    inside = torch.cdist(real.detach().double(), fake.detach().double()) <= nearest_radii(real, k)[:, None]
    return inside.double().sum(0).mean().item() / k, inside.any(1).double().mean().item()


def nearest_radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance of each sample to its k-th nearest neighbour in the same set, itself not counted.

    Raises:
        ValueError: when the set has no k neighbours.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} samples have no {k}-th neighbour")
    features = features.detach().double()
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values
