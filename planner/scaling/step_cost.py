"""What an engine step costs, fitted to the steps that workers report. The law and its fit are costs.step_time's.

Errors count relative to each step's own duration. Steps of workers that still warm up are left out: they compile
kernels and fill caches (dynamo issue 12430). Knows nothing of devices or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from costs.step_time import StepCostFit, StepWork
from planner.scaling.observation import StepSample

REMEMBERED = 500  # about this many samples count: at ten workers and 10 s, those of ten minutes


def measured(fit: StepCostFit, samples: Iterable[StepSample], warmup_s: float) -> StepCostFit:
    """The fit after these samples, of which those of young workers and of steps without a duration are left out."""
    for sample in samples:
        work = StepWork(sample.num_prefill_tokens, sample.num_decode_seqs, sample.num_context_tokens)
        parts = (work.num_prefill_tokens, work.num_decode_seqs, work.num_context_tokens, sample.duration_s)
        if sample.duration_s > 0 and all(map(math.isfinite, parts)) and sample.worker_age_s >= warmup_s:
            fit = fit.with_step(work, sample.duration_s, sample.duration_s, REMEMBERED)
    return fit
