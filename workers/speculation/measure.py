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
from workers.sampling.params import GREEDY, SamplingParams
from workers.speculation.step_costs import StepCosts, lengths_of, sizes_to_measure

log = logging.getLogger(__name__)

_RUNS = 3
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
    sizes = sizes_to_measure(max_num_seqs, max_num_tokens)

    def measured(sampling: SamplingParams) -> dict[tuple[int, int], float]:
        return {size: _step_s(runner, _plan(size, context, block_size, num_groups, sampling)) for size in sizes}

    greedy_s, sampled_s = measured(GREEDY), measured(SamplingParams(temperature=1.0))
    shown = ", ".join(f"{size}: {1000 * seconds:.2f}" for size, seconds in greedy_s.items())
    log.info("greedy steps of (sequences, draft tokens) in ms: %s", shown)
    return StepCosts(greedy_s, sampled_s)


def _plan(size: tuple[int, int], context: int, block_size: int, num_groups: int, sampling: SamplingParams) -> StepPlan:
    chunks = []
    for length in lengths_of(*size):
        end = context + length
        blocks = [[0] * -(-end // block_size) for _ in range(num_groups)]
        chunks.append(DirectChunk([0] * length, context, end, blocks, length, sampling))
    return direct_plan(chunks)


def _step_s(runner: TakesSteps, plan: StepPlan) -> float:
    runner.start(plan)()
    took_s = []
    for _ in range(_RUNS):
        began_s = time.perf_counter()
        runner.start(plan)()
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s)
