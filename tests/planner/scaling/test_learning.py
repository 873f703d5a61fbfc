"""What is learned from measurements: the cost of a step, and the trend of arrivals."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costs.step_time import MIN_SAMPLES, StepCost, StepCostFit
from planner.scaling.forecast import Trend, observe
from planner.scaling.step_cost import measured
from tests.planner.scaling.fakes import COSTS, samples

positive = st.floats(1e-6, 1e-2)


@settings(deadline=None)
@given(positive, positive, positive, st.floats(1e-9, 1e-6))
def test_exact_steps_give_their_coefficients(base: float, prefill: float, seqs: float, context: float) -> None:
    truth = StepCost(base, prefill, seqs, context)
    cost = measured(StepCostFit(), samples(truth), 0).cost()
    assert cost is not None
    for size in ((0, 1, 1_000), (200, 0, 0), (400, 32, 60_000)):
        assert cost.step_s(*size) == pytest.approx(truth.step_s(*size), rel=0.02)


def test_too_few_samples_give_no_cost() -> None:
    fit = measured(StepCostFit(), samples(COSTS["mixed"])[: MIN_SAMPLES - 1], 0)
    assert fit.cost() is None


def test_steps_that_were_not_measured_are_left_out() -> None:
    steps = samples(COSTS["mixed"])
    broken = [dataclasses.replace(steps[0], duration_s=value) for value in (0.0, -1.0, math.nan, math.inf)]
    broken.append(dataclasses.replace(steps[0], num_prefill_tokens=math.nan))
    assert measured(StepCostFit(), broken, 0) == StepCostFit()


def test_no_coefficient_is_negative() -> None:
    """Steps that become shorter with more streams, by chance, must not make streams free of charge or worse."""
    steps = [
        dataclasses.replace(step, duration_s=max(1e-3, 0.02 - 1e-4 * step.num_decode_seqs))
        for step in samples(COSTS["decode"])
    ]
    cost = measured(StepCostFit(), steps, 0).cost()
    assert cost is not None
    assert min(dataclasses.astuple(cost)) >= 0


def test_old_steps_fade() -> None:
    """A worker that became twice as slow is seen so after enough new samples."""
    fit = measured(StepCostFit(), samples(COSTS["decode"]), 0)
    for _ in range(200):
        fit = measured(fit, samples(COSTS["decode"], factor=2.0), 0)
    cost = fit.cost()
    assert cost is not None
    assert cost.step_s(0, 32, 60_000) == pytest.approx(2 * COSTS["decode"].step_s(0, 32, 60_000), rel=0.02)


# ---- arrivals


def follow(values: list[float], interval_s: float = 10.0) -> Trend | None:
    trend = None
    for number, value in enumerate(values):
        trend = observe(trend, value, number * interval_s)
    return trend


def test_zeros_before_the_first_arrival_are_skipped() -> None:
    assert follow([0.0] * 20) is None
    assert follow([0.0] * 20 + [5.0]) == Trend(200.0, 5.0)


def test_a_constant_rate_is_forecast_as_it_is() -> None:
    trend = follow([8.0] * 60)
    assert trend is not None
    assert trend.ahead(300.0, 0.9) == pytest.approx(8.0)


def test_a_ramp_is_forecast_ahead() -> None:
    """One more request a second every ten seconds; in a minute there will be six more."""
    trend = follow([float(number) for number in range(1, 121)])
    assert trend is not None
    assert trend.ahead(60.0) == pytest.approx(126.0, rel=0.03)


def test_a_higher_quantile_of_noise_is_more() -> None:
    rng = random.Random(3)
    trend = follow([10 + rng.gauss(0, 2) for _ in range(200)])
    assert trend is not None
    assert trend.ahead(60.0, 0.9) > trend.ahead(60.0, 0.5)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50), st.floats(1, 600))
def test_a_forecast_is_never_negative_nor_nan(values: list[float], horizon_s: float) -> None:
    trend = follow(values)
    if trend is not None:
        assert 0 <= trend.ahead(horizon_s, 0.5) < math.inf


def test_the_same_time_twice_changes_nothing() -> None:
    trend = Trend(10.0, 5.0)
    assert observe(trend, 9.0, 10.0) == trend
