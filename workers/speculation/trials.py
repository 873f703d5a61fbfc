"""Whether drafts pay at all in a batch of some size, by what whole steps were seen to bring with them and without.

Estimates of single drafts leave out what the host does between steps. So each way is tried for a few steps, and the
faster one is kept until the other is tried again: so rarely that trials cost half a hundredth of the time. Pure.
"""

from __future__ import annotations

import math
from collections import deque

_TRIAL_STEPS = 16
_SETTLING_STEPS = 3  # of a stretch that do not count: some were planned before it, and a draft catches up
_TRIAL_SHARE = 0.005  # of the time, lost in trials
_PERIOD = (64, 2048)  # steps between two trials, least and most
_OUTLIERS = 8  # of so many steps the slowest does not count
_MIN_GAIN = math.log(1.01)  # of drafts that stay
_LATEST = 0.4  # weight of the last comparison: machines are noisy


class DraftTrials:
    """Of one engine. Batches of like size are judged together."""

    def __init__(self) -> None:
        self._batches: dict[int, _Batches] = {}

    def has_drafts(self, num_seqs: int) -> bool:
        """Whether steps of so many sequences get drafts now."""
        return self._of(num_seqs).is_drafted

    def note(self, num_seqs: int, num_tokens: float, interval_s: float) -> None:
        """A step brought so many tokens to each sequence, so long after the one before it."""
        self._of(num_seqs).note(num_tokens, interval_s)

    def _of(self, num_seqs: int) -> _Batches:
        size = num_seqs.bit_length()
        found = self._batches.get(size)
        if found is None:
            found = self._batches[size] = _Batches()
        return found


class _Batches:
    """Of like size: stretches of steps with drafts and without."""

    def __init__(self) -> None:
        self.is_drafted = True
        self._is_trial = True
        self._num_steps, self._num_tokens, self._took_s = 0, 0.0, 0.0  # of this stretch
        self._length = _TRIAL_STEPS
        self._steps: deque[tuple[float, float]] = deque(maxlen=4 * _TRIAL_STEPS)  # tokens, seconds
        self._token_s: dict[bool, float] = {}  # of each way, at the end of its last stretch
        self._gain: float | None = None  # logarithm of how many times as fast drafts make it

    def note(self, num_tokens: float, interval_s: float) -> None:
        """As in DraftTrials."""
        self._num_steps, self._num_tokens = self._num_steps + 1, self._num_tokens + num_tokens
        self._took_s += interval_s
        if self._num_steps > _SETTLING_STEPS:
            self._steps.append((num_tokens, interval_s))
        if self._num_steps < self._length:
            return
        self._token_s[self.is_drafted] = _token_s(self._steps)
        if self._is_trial and len(self._token_s) == 2:
            gain = math.log(self._token_s[False] / self._token_s[True])
            self._gain = gain if self._gain is None else self._gain + _LATEST * (gain - self._gain)
            lost = self._took_s / min(self._token_s.values()) - self._num_tokens  # steps; what does not count, too
            self._begin(self._gain >= _MIN_GAIN, round(min(max(lost / _TRIAL_SHARE, _PERIOD[0]), _PERIOD[1])))
            self._is_trial = False
        else:
            self._begin(not self.is_drafted, _TRIAL_STEPS)
            self._is_trial = True

    def _begin(self, is_drafted: bool, length: int) -> None:
        self.is_drafted, self._length = is_drafted, length
        self._num_steps, self._num_tokens, self._took_s = 0, 0.0, 0.0
        self._steps.clear()


def _token_s(steps: deque[tuple[float, float]]) -> float:
    """Seconds a token, without the slowest steps."""
    counted = sorted(steps, key=lambda step: step[1])[: len(steps) - len(steps) // _OUTLIERS]
    return sum(seconds for _, seconds in counted) / sum(tokens for tokens, _ in counted)
