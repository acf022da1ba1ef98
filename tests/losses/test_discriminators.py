"""What discriminators look at: random and pretrained features, a module of the user's own, and the condition."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.denoiser import Condition
from distill.errors import UserError
from distill.losses.adversarial import Discriminator, condition_vector, feature_body
from distill.losses.projected import ProjectedFeatures


class Own(nn.Module):
    """A body of which one layer is trained and one is not."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.fixed, self.trained = nn.Conv2d(shape[0], 4, 3), nn.Conv2d(4, 4, 1)
        self.fixed.requires_grad_(False)

    def forward(self, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"own": self.trained(self.fixed(x_t))}


def test_what_needs_no_gradient_is_neither_trained_nor_saved() -> None:
    body = feature_body(f"{__name__}:Own", (1, 8, 8))
    judge = Discriminator({"own": (4, 6, 6)}, 16, body)
    names = dict(judge.named_parameters())
    assert "body.trained.weight" in names and "body.fixed.weight" not in names and all(p.requires_grad for p in names.values())
    judge.of_samples(torch.randn(2, 1, 8, 8), torch.zeros(2)).sum().backward()
    assert names["body.trained.weight"].grad is not None


def test_random_features_are_the_same_each_time_and_know_the_noise_level() -> None:
    x = torch.randn(2, 1, 8, 8)
    a, b = (feature_body("random", (1, 8, 8)) for _ in range(2))
    assert not list(a.parameters())
    low, high = a(x, torch.zeros(2)), a(x, torch.ones(2))
    assert all(torch.equal(low[n], f) for n, f in b(x, torch.zeros(2)).items()) and all(not torch.equal(low[n], high[n]) for n in low)


def test_random_features_are_of_images() -> None:
    with pytest.raises(UserError, match="random looks at images, and these samples are 16×64"):
        feature_body("random", (16, 64))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that torchvision takes its weights from, with random ones of the right shapes."""
    from torchvision.models import EfficientNet_B0_Weights, efficientnet_b0

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(efficientnet_b0().state_dict(), folder / Path(EfficientNet_B0_Weights.IMAGENET1K_V1.url).name)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_projected_features_are_frozen_and_pass_gradients(channels: int, weights: Path) -> None:
    body = feature_body("projected", (channels, 8, 8))
    assert not list(body.parameters())
    x = torch.randn(2, channels, 8, 8, requires_grad=True)
    features = body(x, torch.zeros(2))
    assert [tuple(f.shape) for f in features.values()] == [(2, 64, 56, 56), (2, 64, 28, 28), (2, 64, 14, 14), (2, 64, 7, 7)]
    sum(f.square().mean() for f in features.values()).backward()  # type: ignore[union-attr]
    assert x.grad is not None and bool(x.grad.any())


def test_projected_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **settings: Any) -> Any:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"^gan.features projected needs https://\S+, which could not be downloaded from here \(OSError\): go online once$"):
        ProjectedFeatures((3, 8, 8))
    with pytest.raises(UserError, match="images of 1 or 3 channels, and these samples are 4×8×8"):
        ProjectedFeatures((4, 8, 8))


def test_conditions_as_vectors() -> None:
    device = torch.device("cpu")
    labels = condition_vector({"class_labels": torch.arange(1000)}, 1000, device)
    cosine = labels @ labels.T / labels.square().sum(1)
    off = cosine - torch.eye(1000)
    assert float(off.abs().max()) < 0.8 and float(off.square().mean().sqrt()) < 0.13  # 64 numbers: 1/sqrt(64) at random
    tokens = torch.randn(3, 7, 16)
    told = condition_vector({"encoder_hidden_states": tokens}, 3, device)
    ragged = condition_vector({"encoder_hidden_states": list(tokens)}, 3, device)
    assert told.shape == (3, 16) and torch.equal(told, ragged)
    assert condition_vector(Condition().values, 5, device).shape == (5, 0)


def test_a_judge_that_is_told_the_condition_uses_it() -> None:
    torch.manual_seed(0)
    judge = Discriminator({"a": (8, 4, 4), "b": (10, 16), "c": (3,)}, 16, told=4)
    features = {"a": torch.randn(5, 8, 4, 4), "b": torch.randn(5, 10, 16), "c": torch.randn(5, 3)}
    one, other = judge(features, torch.randn(5, 4)), judge(features, torch.randn(5, 4))
    assert one.shape == (5, 3) and bool((one != other).all())
    assert torch.equal(judge(features), judge(features))
