"""What ``distill verify gdd`` checks of its own."""

from distill.verify import gdd


def test_the_closed_forms_hold_and_the_ablations_miss_them() -> None:
    results = list(gdd.checks())
    assert any(c.must_fail for c in results) and all(c.passed for c in results), [c for c in results if not c.passed]
