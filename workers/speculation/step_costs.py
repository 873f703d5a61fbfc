"""How long a step takes, by how many sequences it has and how many draft tokens beside them.

A table that is measured at the worker's start, between whose sizes it is interpolated. The first draft token of a step
costs more than a later one: the step then has sequences of several lengths, which take another way through attention.
So steps with drafts are never interpolated from one without.

Steps that are measured later correct the table. They include the host's time between two steps, which no measurement at
start has. The size that a step was nearest to is moved towards what it took, and all sizes of its batch are moved with
it a little: a machine that gets slower does so with drafts and without. Pure; reads no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

DRAFTS = (1, 2, 4, 8)  # of each sequence that are measured, beside none, and one of one sequence
_RATE = 0.15  # how far one step moves its size, as a logarithm
_BATCH_RATE = 0.05  # and all sizes of its batch
_MOST_OFF = math.log(1.5)  # a step that took longer is a hiccup, and counts as so much


def sizes_to_measure(max_num_seqs: int, max_num_tokens: int) -> list[tuple[int, int]]:
    """(sequences, draft tokens in all) of the steps to measure, the smallest first."""
    batches = sorted({*(size for size in (1, 4, 16, 64, 256) if size < max_num_seqs), max_num_seqs})
    return [
        (batch, drafts)
        for batch in batches
        for drafts in sorted({0, 1, *(batch * each for each in DRAFTS)})
        if drafts <= 1 or batch + drafts <= max_num_tokens
    ]


def lengths_of(num_seqs: int, num_drafts: int) -> list[int]:
    """Tokens of each sequence of a measured step: the drafts spread evenly, a single one on the first."""
    each, rest = divmod(num_drafts, num_seqs)
    return [1 + each + (index < rest) for index in range(num_seqs)]


class StepCosts:
    """measured_s: of (sequences, draft tokens in all) the seconds; for each batch size at least one without drafts.
    sampled_s: the same where tokens are sampled: noise is drawn for each row, which on a small model is much of a step;
    None: as measured_s."""

    def __init__(
        self, measured_s: Mapping[tuple[int, int], float], sampled_s: Mapping[tuple[int, int], float] | None = None
    ) -> None:
        self._greedy = _Table(measured_s)
        self._sampled = _Table(measured_s if sampled_s is None else sampled_s)

    def step_s(self, num_seqs: int, num_drafts: int, is_sampled: bool = False) -> float:
        """A step of so many sequences with one token each, and so many draft tokens in all."""
        return (self._sampled if is_sampled else self._greedy).step_s(num_seqs, num_drafts)

    def observe(self, num_seqs: int, num_drafts: int, duration_s: float, is_sampled: bool = False) -> None:
        """A step is through. duration_s: since the one before it, but for the drafting."""
        (self._sampled if is_sampled else self._greedy).observe(num_seqs, num_drafts, duration_s)


class _Table:
    """Of one kind of step."""

    def __init__(self, measured_s: Mapping[tuple[int, int], float]) -> None:
        self._batches = sorted({batch for batch, _ in measured_s})
        self._drafts = {batch: sorted(d for b, d in measured_s if b == batch and d) for batch in self._batches}
        self._measured = {size: math.log(max(seconds, 1e-9)) for size, seconds in measured_s.items()}
        self._slower = dict.fromkeys(self._batches, 0.0)  # logarithm, of all sizes of a batch

    def step_s(self, num_seqs: int, num_drafts: int) -> float:
        share = num_drafts / num_seqs
        return _between(self._batches, num_seqs, lambda batch: self._of(batch, share * batch))

    def _of(self, batch: int, drafts: float) -> float:
        measured = self._drafts[batch]
        if not drafts:
            return self._size_s(batch, 0)
        if not measured:
            return self._size_s(batch, 0) * (1 + drafts / batch)
        return _between(measured, max(1.0, drafts), lambda size: self._size_s(batch, size))

    def _size_s(self, batch: int, drafts: int) -> float:
        return math.exp(self._measured[batch, drafts] + self._slower[batch])

    def observe(self, num_seqs: int, num_drafts: int, duration_s: float) -> None:
        if not 0 < duration_s < math.inf:
            return
        batch = _nearest(self._batches, num_seqs)
        if num_drafts and not self._drafts[batch]:
            return
        off = math.log(duration_s / self.step_s(num_seqs, num_drafts))
        off = max(-_MOST_OFF, min(_MOST_OFF, off))
        size = _nearest(self._drafts[batch], max(1.0, num_drafts * batch / num_seqs)) if num_drafts else 0
        self._measured[batch, size] += _RATE * off
        self._slower[batch] += _BATCH_RATE * off


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
