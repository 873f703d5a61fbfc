"""How long a step takes, by how many sequences it has and how many draft tokens beside them.

A table that is measured at the worker's start, between whose sizes it is interpolated. Steps that are measured later
correct it: the size that a step was nearest to is moved towards what it took. Pure; reads no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

WIDTHS = (1, 2, 3, 5, 9)  # tokens of each sequence that are measured
_RATE = 0.1  # how far one step moves its size, as a logarithm
_MOST_OFF = math.log(2)  # a step that took longer is a hiccup, and counts as so much


def sizes_to_measure(max_num_seqs: int, max_num_tokens: int) -> list[tuple[int, int]]:
    """(sequences, tokens of each) of the steps to measure, the smallest first."""
    batches = sorted({*(size for size in (1, 4, 16, 64, 256) if size < max_num_seqs), max_num_seqs})
    return [(batch, width) for batch in batches for width in WIDTHS if batch * width <= max(max_num_tokens, batch)]


class StepCosts:
    """measured_s: of (sequences, tokens of each) the seconds; at least for one token of each batch size."""

    def __init__(self, measured_s: Mapping[tuple[int, int], float]) -> None:
        self._batches = sorted({batch for batch, _ in measured_s})
        self._widths = {batch: sorted(w for b, w in measured_s if b == batch) for batch in self._batches}
        self._measured = {size: math.log(max(seconds, 1e-9)) for size, seconds in measured_s.items()}

    def step_s(self, num_seqs: int, num_drafts: int) -> float:
        """A step of so many sequences with one token each, and so many draft tokens in all."""
        width = 1 + num_drafts / num_seqs
        return _between(self._batches, num_seqs, lambda batch: self._of(batch, width))

    def _of(self, batch: int, width: float) -> float:
        return _between(self._widths[batch], width, lambda measured: math.exp(self._measured[batch, measured]))

    def observe(self, num_seqs: int, num_drafts: int, duration_s: float) -> None:
        """A step is through."""
        if not 0 < duration_s < math.inf:
            return
        off = math.log(duration_s / self.step_s(num_seqs, num_drafts))
        moved = _RATE * max(-_MOST_OFF, min(_MOST_OFF, off))
        batch = _nearest(self._batches, num_seqs)
        self._measured[batch, _nearest(self._widths[batch], 1 + num_drafts / num_seqs)] += moved


def _between(sizes: Sequence[int], at: float, value: Callable[[int], float]) -> float:
    """Linear between the sizes; past the last one as between the last two, and proportional where there is one."""
    if len(sizes) == 1:
        return value(sizes[0]) * max(1.0, at / sizes[0])
    upper = min(max(1, bisect_right(sizes, at)), len(sizes) - 1)
    low, high = sizes[upper - 1], sizes[upper]
    share = max(0.0, (at - low) / (high - low))
    return max(1e-9, value(low) * (1 - share) + value(high) * share)


def _nearest(sizes: Sequence[int], at: float) -> int:
    return min(sizes, key=lambda size: abs(math.log(size / at)))
