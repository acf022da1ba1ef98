"""Whether a network takes several samples in one call. Some pack one sample with its prompt into a single sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.denoiser import BackboneDenoiser, Condition, cat

TOLERANCE = 1e-3  #: of the answers' largest value (and at least 1): matrices of other sizes are multiplied in another order
HALF_TOLERANCE = 5e-2  #: the same in half precision


@torch.no_grad()
def takes_several(denoiser: BackboneDenoiser, x_t: Tensor, t: Tensor, first: Condition, second: Condition) -> bool:
    """Whether two different samples in one call get the answers that each gets alone. (On the meta device: whether the call
    goes through.)

    Args:
        x_t: (1, ...). t: (1,). first, second: conditions of one sample each.
    """
    twice, times = torch.cat([x_t, -x_t]), t.to(x_t.device).expand(1).repeat(2)
    alone = [denoiser.predict(x, t, c).value for x, c in zip(twice.split(1), (first, second), strict=True)]
    try:
        together = denoiser.predict(twice, times, cat([first, second]) if first.values else first).value
    except Exception:  # whatever a network raises for shapes that it does not expect
        return False
    if any(p.is_meta for p in denoiser.backbone.parameters()):
        return True
    wanted = torch.cat(alone)
    limit = TOLERANCE if denoiser.dtype == torch.float32 else HALF_TOLERANCE
    return together.shape == wanted.shape and float((together - wanted).abs().max()) <= limit * max(1.0, float(wanted.abs().max()))
