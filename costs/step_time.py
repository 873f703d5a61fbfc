"""The time of an engine step as a linear function of what is in it, fitted to measured steps.

    step = base + prefill_tokens * a + decode_seqs * b + context_tokens * c

Least squares by normal equations in which old steps fade; no coefficient is negative. Pure; knows nothing of devices,
models or clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_SAMPLES = 5  # four coefficients, and one more to see an error
_RIDGE = 1e-6  # relative: decides between features that always occur together


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step has in it; averages over several steps may be fractions."""

    num_prefill_tokens: float
    num_decode_seqs: float
    num_context_tokens: float  # of all sequences in it, with the tokens that it computes


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds, by what a step has in it."""

    base_s: float
    s_per_prefill_token: float
    s_per_decode_seq: float
    s_per_context_token: float

    def step_s(self, num_prefill_tokens: float, num_decode_seqs: float, num_context_tokens: float) -> float:
        """One step."""
        return (
            self.base_s
            + self.s_per_prefill_token * num_prefill_tokens
            + self.s_per_decode_seq * num_decode_seqs
            + self.s_per_context_token * num_context_tokens
        )


@dataclass(frozen=True, slots=True)
class StepCostFit:
    """What is remembered of measured steps: sums for the normal equations, 16 and 4 numbers."""

    gram: tuple[float, ...] = (0.0,) * 16
    moment: tuple[float, ...] = (0.0,) * 4
    num_samples: int = 0

    def cost(self) -> StepCost | None:
        """The fitted cost; None before there are enough samples."""
        if self.num_samples < MIN_SAMPLES:
            return None
        return StepCost(*_solve(np.reshape(self.gram, (4, 4)), np.array(self.moment)))

    def with_step(self, work: StepWork, duration_s: float, scale_s: float, remembered: float) -> StepCostFit:
        """The fit after one more step. Its error counts in units of scale_s, and about `remembered` steps count."""
        row = np.array([1.0, work.num_prefill_tokens, work.num_decode_seqs, work.num_context_tokens]) / scale_s
        fade = 1 - 1 / remembered
        gram = np.reshape(self.gram, (4, 4)) * fade + np.outer(row, row)
        moment = np.array(self.moment) * fade + row * (duration_s / scale_s)
        return StepCostFit(tuple(map(float, gram.ravel())), tuple(map(float, moment)), self.num_samples + 1)


def _solve(gram: NDArray[np.float64], moment: NDArray[np.float64]) -> list[float]:
    """Least squares without negative coefficients: the most negative one is taken out until none is left."""
    used = [j for j in range(4) if gram[j, j] > 0]
    while True:
        solution = np.zeros(4)
        if not used:
            return [0.0] * 4
        scale = np.sqrt(np.diag(gram)[used])
        scaled = gram[np.ix_(used, used)] / np.outer(scale, scale) + _RIDGE * np.eye(len(used))
        solution[used] = np.linalg.solve(scaled, moment[used] / scale) / scale
        worst = min(used, key=lambda j: float(solution[j]))
        if solution[worst] >= 0:
            return [float(value) for value in solution]
        used.remove(worst)
