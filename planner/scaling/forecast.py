"""Arrivals ahead: Holt's linear trend with an upper quantile of its error (Holt 1957; Hyndman, FPP 3rd ed., 8.2).

Smoothing is by time constants, so decisions need not be equally spaced. Knows nothing of what arrives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.scaling.queueing import normal_quantile

# Level: the noise of counting a few hundred arrivals is averaged out over about three intervals of 10 s. Trend: slower,
# or noise is extrapolated over a startup time. Error: over the length of a usual burst.
LEVEL_S, TREND_S, ERROR_S = 30.0, 180.0, 300.0


@dataclass(frozen=True, slots=True)
class Trend:
    """What is remembered of one series."""

    at_s: float
    level: float
    """Per second."""
    slope: float = 0.0
    """Per second, per second."""
    variance: float = 0.0
    """Of the error of forecasts one interval ahead."""
    level_variance: float = 0.0
    """Of the level: a part of it, as the level is an average."""

    def ahead(self, horizon_s: float, quantile: float = 0.5) -> float:
        """The level that far ahead, not exceeded with this chance; never below zero."""
        return max(
            0.0, self.level + self.slope * horizon_s + normal_quantile(quantile) * math.sqrt(self.level_variance)
        )


def observe(trend: Trend | None, value: float, now_s: float) -> Trend | None:
    """The trend after one more value. Zeros before the first arrival are skipped: they belong to no trend."""
    if trend is None:
        return Trend(now_s, value) if value > 0 else None
    elapsed_s = now_s - trend.at_s
    if elapsed_s <= 0:
        return trend
    expected = trend.level + trend.slope * elapsed_s
    error = value - expected
    alpha, beta, gamma = (1 - math.exp(-elapsed_s / constant) for constant in (LEVEL_S, TREND_S, ERROR_S))
    level = max(0.0, expected + alpha * error)
    slope = trend.slope + beta * ((level - trend.level) / elapsed_s - trend.slope)
    variance = trend.variance + gamma * (error * error - trend.variance)
    return Trend(now_s, level, slope, variance, variance * alpha / (2 - alpha))
