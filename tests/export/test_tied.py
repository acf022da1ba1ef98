"""Networks whose tensors share memory are written, and read again with the same values."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from distill.export.tied import untied


class Tied(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_written(tmp_path: Path) -> None:
    network = Tied()
    with pytest.raises(RuntimeError, match="share memory"):
        network.save_pretrained(tmp_path)
    with untied(SimpleNamespace(components={"network": network})):
        network.save_pretrained(tmp_path)
    read = Tied.from_pretrained(tmp_path)
    assert torch.equal(read.embedding.weight, network.embedding.weight) and torch.equal(read.head.weight, network.head.weight)
    assert network.head.weight is network.embedding.weight and "state_dict" not in vars(network)
