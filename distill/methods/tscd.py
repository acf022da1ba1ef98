"""TSCD, Hyper-SD's trajectory-segmented consistency distillation: 8 segments, then 4, 2 and 1, in one set of weights for all steps.

    Ren et al. 2024, "Hyper-SD", arXiv 2404.13686 (NeurIPS 2024)

    k segments;  t in [b, b'],  s = t − step,  end e ~ U[b, s]:     L = d( f(x_t, t → e), sg f⁻(x_s, s → e) )

First the trajectory is kept piece by piece, then as a whole. Afterwards scores and rewards of the student's own samples:
``matching: {guidance_scale: …}`` with ``matching_from: 0.75``, and ``terms: [{kind: clip}]``. The paper's blend of distances, adversarial where t and e
lie far apart, is a constant one here: ``gan: {real: data, …}``.

One network for all ends e is told none: DDIM to any of them by the same x0-prediction. ``end: random`` is a compromise between the
ends' own, exact for none (``end: edge`` is); what it buys is a student that goes to any level in one step.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.losses.metrics import Metric
from distill.mapping.pairs import End
from distill.methods.consistency import Consistency


class TSCD(Consistency):
    """Segments that merge over training."""

    name: Literal["tscd"] = "tscd"  # type: ignore[assignment]
    steps: Annotated[int, Field(ge=1, le=8)] = 8
    discretization: Annotated[tuple[int, int], Field()] = (64, 64)
    segments: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [8, 4, 2, 1]
    end: End = "random"
    gamma: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    metric: Metric = "l2"
