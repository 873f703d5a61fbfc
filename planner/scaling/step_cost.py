"""The time of an engine step as a linear function of what is in it, fitted to measured steps.

    step = base + prefill_tokens * a + decode_seqs * b + context_tokens * c

Least squares of the relative error, by normal equations in which old steps fade; no coefficient is negative. Steps of
workers that still warm up are left out: they compile kernels and fill caches (dynamo issue 12430).
Knows nothing of devices or models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.scaling.observation import StepSample

MIN_SAMPLES = 5  # four coefficients, and one more to see an error
REMEMBERED = 500  # about this many samples count: at ten workers and 10 s, those of ten minutes
_RIDGE = 1e-6  # relative: decides between features that always occur together


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


def measured(fit: StepCostFit, samples: Iterable[StepSample], warmup_s: float) -> StepCostFit:
    """The fit after these samples, of which those of young workers and of steps without a duration are left out."""
    gram, moment, count = np.reshape(fit.gram, (4, 4)), np.array(fit.moment), fit.num_samples
    for sample in samples:
        row = np.array([1.0, sample.num_prefill_tokens, sample.num_decode_seqs, sample.num_context_tokens])
        usable = sample.duration_s > 0 and bool(np.isfinite([*row, sample.duration_s]).all())
        if not usable or sample.worker_age_s < warmup_s:
            continue
        row = row / sample.duration_s
        fade = 1 - 1 / REMEMBERED
        gram, moment, count = gram * fade + np.outer(row, row), moment * fade + row, count + 1
    return StepCostFit(tuple(map(float, gram.ravel())), tuple(map(float, moment)), count)


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
