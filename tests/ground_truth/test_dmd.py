"""What ``distill verify dmd`` checks of its own."""

from distill.verify import dmd


def test_the_closed_forms_hold_and_the_ablations_miss_them() -> None:
    results = list(dmd.checks())
    assert any(c.must_fail for c in results) and all(c.passed for c in results), [c for c in results if not c.passed]
