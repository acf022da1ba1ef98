"""A safety checker that lets everything pass, in a file of its own: an exported pipeline carries the file with it."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin


class Unchecked(ModelMixin, ConfigMixin):
    """Takes the place of the safety checker."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("marker", torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames
