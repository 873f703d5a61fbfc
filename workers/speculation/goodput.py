"""How many draft tokens a step takes: as many as give the most expected tokens for its time.

Liu et al., "TurboSpec", arXiv 2406.14066. Each draft token counts as likely as it and all before it are to be accepted.
Those of all requests are ranked by that, and of every number of them, from none on, the time of the step is known: the
number with the most tokens a second is taken. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FADE = 0.95  # of what a step counts, with each one more
_BIAS = (1.0, 4.0)  # least and most
_RELAXED = 0.8


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """What a step takes."""

    lengths: Sequence[int]  # draft tokens of each request
    gain: float  # times as many tokens a second as without drafts, as expected


class GainBias:
    """How much more was expected of drafts than they brought, lately: the maximum of noisy estimates is too high (the
    winner's curse)."""

    def __init__(self) -> None:
        self._expected = self._brought = self._weight = 1.0

    def note(self, expected: float, brought: float) -> None:
        """A step is through for which drafts were asked."""
        self._expected = _FADE * self._expected + expected
        self._brought = _FADE * self._brought + brought
        self._weight = _FADE * self._weight + 1

    def relax(self) -> None:
        """No drafts pay, and nothing is learnt: believe in them a little more, or they would never be tried again."""
        self._expected = self._brought + _RELAXED * (self._expected - self._brought)

    @property
    def brought(self) -> float:
        """By a step, on average."""
        return self._brought / self._weight

    @property
    def ratio(self) -> float:
        """Expected over brought; at least 1: what goes better than expected needs no correction."""
        return min(max(self._expected / self._brought, _BIAS[0]), _BIAS[1])


def draft_budget(
    survival: Sequence[Sequence[float]],
    num_seqs: int,
    max_drafts: int,
    step_s: Callable[[Sequence[int], int], float],
    min_gain: float,
) -> DraftBudget:
    """How many draft tokens of each request the step takes; zeros when less than min_gain is expected of them.

    survival: of each request the likelihoods of its draft tokens, falling. num_seqs: sequences in the step, also those
    without drafts. max_drafts: in all. step_s: the time of a step, by the lengths and by their sum.
    """
    lengths, best = [0] * len(survival), [0] * len(survival)
    plain = best_rate = num_seqs / step_s(lengths, 0)
    expected = float(num_seqs)
    ranked = [(-likely[0], index) for index, likely in enumerate(survival) if likely]
    heapq.heapify(ranked)
    stride = max(1, num_seqs // 4)  # of the numbers that are looked at: neighbours of a large batch differ little
    for num_drafts in range(1, max_drafts + 1):
        if not ranked:
            break
        negative, index = heapq.heappop(ranked)
        expected -= negative
        lengths[index] += 1
        if lengths[index] < len(survival[index]):
            heapq.heappush(ranked, (-survival[index][lengths[index]], index))
        if num_drafts % stride and ranked:
            continue
        rate = expected / step_s(lengths, num_drafts)
        if rate > best_rate and rate > min_gain * plain:
            best_rate, best = rate, list(lengths)
    return DraftBudget(best, best_rate / plain)
