"""What ``distill verify msd`` checks of its own."""

import pytest

from distill.methods.msd import MSD
from distill.verify import msd


def test_the_closed_forms_hold_and_the_ablations_miss_them() -> None:
    results = list(msd.checks())
    assert sum(c.must_fail for c in results) == 4
    assert all(c.passed for c in results), [c for c in results if not c.passed]


def test_what_it_needs() -> None:
    assert MSD().experts() is not None and MSD(students=1).experts() is None
    assert not MSD().needs_images() and MSD(teacher_matching=0.2).needs_images()
    own = MSD(teacher_matching=0.2, real="teacher")
    assert not own.needs_images() and own.needs_pairs() is not None
    assert MSD(teacher_matching=0.25).stretch(0.1) == (0.0, 0.25) and MSD(teacher_matching=0.25).stretch(0.5) == (0.25, 1.0)
    with pytest.raises(ValueError, match="real teacher"):
        MSD(real="teacher")
