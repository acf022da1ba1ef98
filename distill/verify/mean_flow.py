"""MeanFlow on a Gaussian: the map from samples alone, the tangent, and short jumps."""

from __future__ import annotations

from collections.abc import Iterator

from distill.matching.time_pairs import TimePairs
from distill.methods import flow_map as rule
from distill.methods.mean_flow import MeanFlow
from distill.verify.core import Check, at_most, replaced
from distill.verify.flow_map import DATA_STEPS, SCHEDULES, map_errors, trained, without_tangent

#: the jumps of four even steps, and none longer
SHORT = MeanFlow(pairs=TimePairs(diagonal=0.5, to_data=0.2, from_noise=0.2, interval=0.25), steps=4)


def checks() -> Iterator[Check]:
    name = "{}: error of the map learnt from samples, {} steps"
    errors = map_errors(*trained(MeanFlow(), SCHEDULES["flow"], DATA_STEPS, 512), (1, 4, 16))
    for steps, error in zip((1, 4, 16), errors, strict=True):
        yield at_most("mean_flow", name.format("flow", steps), error, 0.03)
    with replaced(rule, "directional_derivative", without_tangent):
        error = map_errors(*trained(MeanFlow(), SCHEDULES["flow"], 800), (1,))[0]
    yield at_most("mean_flow", name.format("ablation: tangent (0, 1, 0) for (v, 1, 0)", 1), error, 0.06, must_fail=True)
    one, four = map_errors(*trained(SHORT, SCHEDULES["flow"], DATA_STEPS, 512), (1, 4))
    yield at_most("mean_flow", name.format("restricted to jumps of a quarter", 4), four, 0.03)
    yield at_most("mean_flow", name.format("ablation: restricted to jumps of a quarter", 1), one, 0.03, must_fail=True)
