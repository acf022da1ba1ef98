"""What ``distill verify dmd2`` checks, and the reference numbers of the literature's divergences."""

import pytest
import torch

from distill.losses.divergence import DIVERGENCES
from distill.methods.dmd2 import DMD2
from distill.verify import any_method, dmd2


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients(divergence: str) -> None:
    """The gradient that DMD2.step yields equals autograd of the divergence by quadrature, to 1e-2 at 1e5 samples and
    shrinking as 1/√n; with a critic of another student, without the weight h(r), or with q/p for p/q it does not."""
    results = list(dmd2.gradient_checks(divergence))  # type: ignore[arg-type]
    assert sum(not c.must_fail for c in results) == 2 and sum(c.must_fail for c in results) == (1 if divergence == "reverse_kl" else 3)
    assert all(c.passed for c in results), results


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "forward_kl"])
def test_optima_on_two_modes(divergence: str, sigma: float) -> None:
    mean, std = dmd2.OPTIMA[divergence, sigma]
    found = dmd2.optimum(divergence, sigma)  # type: ignore[arg-type]
    assert found == (pytest.approx(mean, rel=0.01), pytest.approx(std, rel=0.01))


def test_reverse_kl_seeks_a_mode_where_forward_kl_covers_both() -> None:
    assert abs(dmd2.OPTIMA["reverse_kl", 0.3][0] - dmd2.optimum("forward_kl", 0.3)[0]) > 1


def test_two_time_scales() -> None:
    torch.manual_seed(0)
    assert [dmd2.overshoot(k) for k in (1, 2, 4)] == [pytest.approx(0.2875, abs=1e-3), pytest.approx(0.0615, abs=1e-3), 0.0]
    assert all(c.passed for c in dmd2.two_time_scale_checks())


def test_holds_for_any_method() -> None:
    assert all(c.passed for c in any_method.checks("dmd2", DMD2()))


@pytest.mark.slow
def test_training_covers_eight_modes() -> None:
    assert all(c.passed for c in dmd2.mixture_checks())
