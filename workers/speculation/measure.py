"""Measures how long steps take, by how many sequences and draft tokens they have: once, at a worker's start.

Every rank of a worker runs the same steps, since they have collectives in them. Knows nothing of models or devices.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Protocol

from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.step import StepPlan
from workers.sampling.params import SamplingParams
from workers.speculation.step_costs import StepCosts, lengths_of, sizes_to_measure

log = logging.getLogger(__name__)

_RUNS = 3
_SAMPLED = SamplingParams(temperature=1.0)  # noise is drawn for every row, which on a small model is much of a step
_CONTEXT_TOKENS = 256  # before each sequence's tokens


class TakesSteps(Protocol):
    """What is measured."""

    def start(self, plan: StepPlan) -> Callable[[], object]:
        """As ModelRunner.start."""


def measure_step_costs(
    runner: TakesSteps,
    max_num_seqs: int,
    max_num_tokens: int,
    max_context_tokens: int,
    block_size: int,
    num_groups: int,
) -> StepCosts:
    """On all ranks at once, before requests come; nothing is written to the cache."""
    context = max(0, min(_CONTEXT_TOKENS, max_context_tokens - 16)) // block_size * block_size
    measured_s: dict[tuple[int, int], float] = {}
    for num_seqs, num_drafts in sizes_to_measure(max_num_seqs, max_num_tokens):
        chunks = []
        for length in lengths_of(num_seqs, num_drafts):
            end = context + length
            blocks = [[0] * -(-end // block_size) for _ in range(num_groups)]
            chunks.append(DirectChunk([0] * length, context, end, blocks, length, _SAMPLED))
        plan = direct_plan(chunks)
        runner.start(plan)()
        took_s = []
        for _ in range(_RUNS):
            began_s = time.perf_counter()
            runner.start(plan)()
            took_s.append(time.perf_counter() - began_s)
        measured_s[num_seqs, num_drafts] = statistics.median(took_s)
    shown = ", ".join(f"{size}: {1000 * seconds:.2f}" for size, seconds in measured_s.items())
    log.info("steps of (sequences, draft tokens) in ms: %s", shown)
    return StepCosts(measured_s)
