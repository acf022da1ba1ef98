"""Divergence weights, ratio normalisation, metrics, adversarial losses."""

import math

import pytest
import torch

from distill.losses.adversarial import ADVERSARIAL, Discriminator
from distill.losses.divergence import DIVERGENCES, GENERATORS, RatioNormalizer, divergence_weight
from distill.losses.embedding import random_embedding
from distill.losses.metrics import METRICS, batch_mean_abs, l2, pseudo_huber, pseudo_huber_elementwise


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weight_is_r_squared_times_the_second_derivative(divergence: str) -> None:
    r = torch.linspace(0.05, 8, 60, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[divergence](r).sum(), r, create_graph=True)  # type: ignore[index]
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(divergence_weight(divergence, r).detach(), (r**2 * second).detach(), rtol=1e-8, atol=1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_generators_vanish_at_equality(divergence: str) -> None:
    assert abs(float(GENERATORS[divergence](torch.tensor(1.0)))) < 1e-7  # type: ignore[index]


def test_normalised_weights_have_mean_one() -> None:
    torch.manual_seed(0)
    normalizer = RatioNormalizer(decay=0.0)
    t, logits = torch.rand(512, dtype=torch.float64), torch.randn(512)
    for divergence in DIVERGENCES:
        weight = normalizer.weight(divergence, logits, t, normalizer.initial_state())
        assert float(weight.mean()) == pytest.approx(1, abs=1e-5) and (weight >= 0).all()


def test_a_shift_of_all_logits_of_a_noise_level_does_not_matter() -> None:
    """Stage 1 divides by the bin's mean: E_q r = 1 at every t (clips aside)."""
    torch.manual_seed(0)
    normalizer = RatioNormalizer(decay=0.0, clip=(1e-9, 1e9))
    t, logits = torch.rand(512, dtype=torch.float64), torch.randn(512) * 0.3
    shift = (t * 10).long().float() * 0.2
    a = normalizer.weight("forward_kl", logits, t, normalizer.initial_state())
    b = normalizer.weight("forward_kl", logits + shift, t, normalizer.initial_state())
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_running_means() -> None:
    normalizer = RatioNormalizer(times=(0.0, 1.0), bins=2, decay=0.5)
    state = normalizer.initial_state()
    normalizer.ratio(torch.full((4,), math.log(3.0)), torch.full((4,), 0.9, dtype=torch.float64), state)
    assert state.tolist() == [1.0, pytest.approx(2.0)]
    r = normalizer.ratio(torch.tensor([100.0]), torch.tensor([0.1], dtype=torch.float64), state)
    assert state[0] == pytest.approx(0.5 + 0.5 * 20) and float(r) == pytest.approx(20 / 10.5, rel=1e-4)  # clipped at 20


def test_a_learned_ratio_is_the_ratio() -> None:
    """The logistic loss makes logits of log p/q: slope 1 between two Gaussians."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 800)
        loss = ADVERSARIAL["logistic"].discriminator(net(0.5 + torch.randn(1024, 1)), net(-0.5 + torch.randn(1024, 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.linspace(-1.5, 1.5, 50)[:, None]
    logits = net(x).detach()[:, 0]
    slope = float(((logits - logits.mean()) * (x[:, 0] - x.mean())).sum() / ((x[:, 0] - x.mean()) ** 2).sum())
    assert slope == pytest.approx(1.0, abs=0.08)  # log N(x; .5, 1)/N(x; −.5, 1) = x
    assert float(torch.corrcoef(torch.stack([logits, x[:, 0]]))[0, 1]) > 0.99


def test_pseudo_huber_limits() -> None:
    a, b = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    d = 48
    norm = (a - b).flatten(1).norm(dim=1)
    torch.testing.assert_close(pseudo_huber(a, b, c=1e-6), norm / math.sqrt(d), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pseudo_huber(a.double(), b.double(), c=1e4) * 2e4 / math.sqrt(d), l2(a.double(), b.double()), rtol=1e-4, atol=1e-6)
    assert all((metric(a, b) > 0).all() and metric(a, a).abs().max() < 1e-6 for metric in METRICS.values())
    torch.testing.assert_close(pseudo_huber_elementwise(a, b, c=1e-7), (a - b).abs().flatten(1).mean(1), rtol=1e-3, atol=1e-4)


def test_batch_mean_abs() -> None:
    x = torch.stack([torch.full((2, 3), -2.0), torch.full((2, 3), 0.5)])
    assert batch_mean_abs(x).flatten().tolist() == [2.0, 0.5] and batch_mean_abs(x).shape == (2, 1, 1)


def test_adversarial_losses_at_chance() -> None:
    zero = torch.zeros(8, 3)
    logistic = ADVERSARIAL["logistic"]
    assert float(logistic.generator(zero, None)) == pytest.approx(math.log(2))
    assert float(logistic.discriminator(zero, zero)) == pytest.approx(2 * math.log(2))


def test_heads_fit_their_features() -> None:
    judge = Discriminator({"a": (8, 4, 4), "b": (10, 16), "c": (3,)}, hidden=16)
    logits = judge({"a": torch.randn(5, 8, 4, 4), "b": torch.randn(5, 10, 16), "c": torch.randn(5, 3)})
    assert logits.shape == (5, 3)


@pytest.mark.parametrize(("shape", "features"), [((3, 8, 8), 16 * 4), ((3, 5, 8, 8), 16 * 4), ((7, 3), 16), ((3,), 16)])
def test_random_embeddings_of_any_samples(shape: tuple[int, ...], features: int) -> None:
    x = torch.randn(4, *shape, requires_grad=True)
    embed = random_embedding(x, 16, 2, seed=0)
    assert embed(x).shape == (4, features) and torch.equal(embed(x), random_embedding(x, 16, 2, seed=0)(x))
    torch.testing.assert_close(embed(x[:1]), embed(x)[:1])
    (gradient,) = torch.autograd.grad(embed(x).square().sum(), x)
    assert bool(gradient.flatten(1).any(1).all())
