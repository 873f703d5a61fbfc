"""Whether counts are a sample of a distribution (Pearson's test)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def p_value(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """Chance of counts at least so far from the expected ones. Tokens of few expected counts are taken together;
    one without probability must not have been drawn."""
    total, statistic, bins = sum(counts), 0.0, 0
    rest_count, rest_expected = 0, 0.0
    for count, probability in zip(counts, probabilities, strict=True):
        assert probability > 0 or count == 0, "drawn, but impossible"
        if (expected := total * probability) >= 8:
            statistic, bins = statistic + (count - expected) ** 2 / expected, bins + 1
        else:
            rest_count, rest_expected = rest_count + count, rest_expected + expected
    if rest_expected >= 1:
        statistic, bins = statistic + (rest_count - rest_expected) ** 2 / rest_expected, bins + 1
    return _upper_tail(statistic, bins - 1)


def _upper_tail(statistic: float, freedom: int) -> float:
    """By Wilson and Hilferty: the cube root of a chi-square number is nearly normal."""
    if freedom < 1:
        return 1.0
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(z / math.sqrt(2)) / 2
