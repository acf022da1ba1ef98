"""Features of a network pretrained on ImageNet, for an adversary on images (Projected GAN: Sauer et al. 2021, arXiv 2111.01007;
GDD: Zheng & Yang 2024, arXiv 2405.20750).

Four stages of an EfficientNet-B0, each mixed across channels by a random 1×1 convolution that is never trained either: without it
a discriminator comes to look at a few channels alone. The network was trained on ImageNet, as that of the Fréchet Inception
distance: judge a student that it trained by other features too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import UserError

SIZE = 224  #: pixels of a side, as in its training
STAGES = (2, 3, 5, 7)  #: of ``efficientnet_b0.features``: strides 4, 8, 16, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ProjectedFeatures(nn.Module):
    """(x_t, t) → named feature maps (batch, width, h, w) of samples in [−1, 1]; the noise level is not looked at.

    Args:
        shape: (channels, height, width) of the samples; one channel or three.

    Raises:
        UserError: if they are no images, or if the weights are neither here nor to be downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...], width: int = 64, seed: int = 0) -> None:
        super().__init__()
        if len(shape) != 3 or shape[0] not in (1, 3):
            given = "×".join(map(str, shape))
            raise UserError(f"gan.features projected judges images of 1 or 3 channels, and these samples are {given}: use teacher or random")
        self.network = _pretrained()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            x, mixes = torch.zeros(1, 3, SIZE, SIZE), []
            for i, stage in enumerate(self.network[: STAGES[-1] + 1]):
                x = stage(x)
                if i in STAGES:
                    mixes.append(torch.randn(width, x.shape[1], 1, 1, generator=generator) / x.shape[1] ** 0.5)
        for i, mix in enumerate(mixes):
            self.register_buffer(f"mix_{i}", mix)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1))

    def forward(self, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        x = (x_t.float() / 2 + 0.5).expand(-1, 3, -1, -1)
        x = (F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False) - self.mean) / self.std
        features = {}
        for i, stage in enumerate(self.network[: STAGES[-1] + 1]):
            x = stage(x)
            if i in STAGES:
                place = STAGES.index(i)
                features[f"stage_{place}"] = F.conv2d(x, getattr(self, f"mix_{place}"))
        return features


def _pretrained() -> nn.Sequential:
    """The convolutions of EfficientNet-B0 with torchvision's weights, which are downloaded once."""
    from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

    weights = EfficientNet_B0_Weights.IMAGENET1K_V1
    network = efficientnet_b0()
    try:
        network.load_state_dict(torch.hub.load_state_dict_from_url(weights.url, progress=False, check_hash=True, weights_only=True))
    except Exception as error:  # network and cache errors of any kind
        reason = type(error).__name__
        raise UserError(f"gan.features projected needs {weights.url}, which could not be downloaded from here ({reason}): go online once") from None
    features = network.features.eval().requires_grad_(False)
    assert isinstance(features, nn.Sequential)
    return features
