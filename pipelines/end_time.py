"""Tells a backbone where its jump ends: an embedding of the way t − s, added to the backbone's own embedding of the time.

    e(t) + W₂ silu(W₁ [cos(f_i (t − s)), sin(f_i (t − s))])            W₂ = 0 at first: the backbone is as it was, for every s

t runs from 0 (data) to 1 (noise). The way is embedded, not its end: at s = t, where the network is a plain denoiser, all of them say the
same, and a short jump is near to it, whatever t is (Boffi et al. 2025, arXiv 2505.18825; Geng et al. 2025, arXiv 2505.13447).
The frequencies are low: the derivative in s, of which such students are trained, grows with them. Needs diffusers alone.
"""

import contextlib
import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class EndTime(ModelMixin, ConfigMixin):
    """The embedding, and the places of a backbone where it is added.

    Args:
        modules: names of the backbone's embeddings of the time, without effects of anything else.
        dims: the widths of what they answer.
        width: of the hidden layer.
        frequencies: number of them, from 1 to ``highest``, evenly in their logarithm, times π/2.
    """

    @register_to_config
    def __init__(self, modules=(), dims=(), width=256, frequencies=16, highest=8.0):
        super().__init__()
        self.hidden = nn.Linear(2 * frequencies, width)
        self.out = nn.Linear(width, sum(dims))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.active = None  # what the hooks add in the forward that runs now, for each module

    def forward(self, way):
        """(n,) t − s → for each module (n, dim)."""
        steps = torch.linspace(0, 1, self.config.frequencies, dtype=torch.float32, device=way.device)
        angles = way.to(torch.float32)[:, None] * self.config.highest**steps * (math.pi / 2)
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(self.hidden.weight.dtype)
        return self.out(nn.functional.silu(self.hidden(waves))).split(list(self.config.dims), 1)

    def attach(self, backbone):
        """Add to the backbone's embeddings from now on, whenever something is active. Returns handles that take the hooks off."""
        return [backbone.get_submodule(name).register_forward_hook(self._adding(i)) for i, name in enumerate(self.config.modules)]

    def _adding(self, i):
        def hook(module, inputs, output):
            if self.active is None:
                return None
            mine = self.active[i].to(output.dtype)
            if len(mine) not in (1, len(output)):  # several rows for each sample
                mine = mine.repeat_interleave(len(output) // len(mine), 0)
            return output + mine.reshape(len(mine), *(1,) * (output.dim() - 2), mine.shape[1])

        return hook

    @contextlib.contextmanager
    def using(self, active):
        """What ``forward`` has answered is added for a while; None: nothing."""
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before
