"""How many prompt tokens a step may have beside running streams, so that it stays under a target time.

The cost of a step is learnt from the steps that were measured (costs.step_time). A step that took far longer than
expected counts as only a few times the expectation: one hiccup teaches little, and a new law is learnt all the same.
What noise adds is learnt too, as the quantile of measured over expected time. The same measurements give the same
budgets. Pure; knows nothing of requests, and reads no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from costs.step_time import StepCostFit, StepWork

QUANTILE = 0.95  # of the steps beside running streams are to stay under the target
REMEMBERED = 64  # about this many steps count: a new law is learnt in a second or two
_MOST_OVER = 3.0  # times the expectation; what a step took beyond that counts as so much
_RATIO_RATE = 0.1  # how far one step moves the quantile, in powers of e
_MOST_RATIO = 20.0
_EQUAL = 1e-3  # relative: without noise, times differ from their expectation by rounding
_PROBE_EVERY = 8  # steps: of steps that all take as long as the target it cannot be learnt what a token costs
_FADE = 0.9  # of the longest prefill that was tried lately


@dataclass(slots=True)
class StepBudget:
    """What is left of a step."""

    num_tokens: int
    num_prefill_tokens: int  # in chunks of more than one token; never more than num_tokens

    @property
    def num_chunk_tokens(self) -> int:
        """The longest chunk that fits."""
        return min(self.num_tokens, self.num_prefill_tokens)

    def spend(self, num_tokens: int, is_chunk: bool) -> None:
        """So many tokens of a request are scheduled."""
        self.num_tokens -= num_tokens
        if is_chunk:
            self.num_prefill_tokens -= num_tokens


class PrefillBudget:
    """target_s: of a step. min_tokens: of prompts in a step, whatever it costs."""

    def __init__(self, target_s: float, min_tokens: int) -> None:
        self._target_s = target_s
        self._min_tokens = min_tokens
        self._fit = StepCostFit()
        self._ratio = 1.0  # QUANTILE of measured over expected time
        self._tried = 0.0  # prefill tokens beside running streams, the most lately

    def num_tokens(self, num_decode_seqs: int, num_context_tokens: int) -> int:
        """Prompt tokens for a step that also gives each of these sequences a token.

        At most twice what was tried lately: the law is known there and not far beyond.
        """
        cost = self._fit.cost()
        if cost is None:
            return self._min_tokens
        spare_s = max(0.0, self._target_s / self._ratio - cost.step_s(0, num_decode_seqs, num_context_tokens))
        token_s = cost.s_per_prefill_token + cost.s_per_context_token
        most = int(2 * self._tried)
        fitting = most if token_s * most <= spare_s else math.floor(spare_s / token_s)
        is_probe = self._fit.num_samples % _PROBE_EVERY == 0
        return max(self._min_tokens, fitting // 2 if is_probe else fitting)

    def observe(self, work: StepWork, duration_s: float) -> None:
        """A step is through."""
        if not 0 < duration_s < math.inf:
            return
        cost, counted_s = self._fit.cost(), duration_s
        if cost is not None:
            expected_s = cost.step_s(work.num_prefill_tokens, work.num_decode_seqs, work.num_context_tokens)
            if expected_s > 0:
                counted_s = min(duration_s, _MOST_OVER * expected_s)
                if work.num_decode_seqs:
                    self._note_ratio(duration_s / expected_s)
        if work.num_decode_seqs and work.num_prefill_tokens:
            self._tried = max(work.num_prefill_tokens, _FADE * self._tried)
        # Errors of steps that nobody waits for, which may be long, count relative to their length.
        self._fit = self._fit.with_step(work, counted_s, max(counted_s, self._target_s), REMEMBERED)

    def _note_ratio(self, ratio: float) -> None:
        """Move the quantile up by QUANTILE or down by the rest, so that it is exceeded as often as it should be."""
        step = QUANTILE if ratio > self._ratio * (1 + _EQUAL) else QUANTILE - 1
        self._ratio = min(_MOST_RATIO, max(1.0, self._ratio * math.exp(_RATIO_RATE * step)))
