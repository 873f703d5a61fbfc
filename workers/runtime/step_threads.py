"""How many threads a step on a CPU computes with: all that it may, or one where more make it hardly faster.

A small step on several threads waits for the slowest of them at every operation. On one thread it takes nearly as
long, and leaves the other cores to the server, the router and other workers, on whose work the threads would wait.
Chosen once, by a measurement at start. Knows nothing of models.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch

log = logging.getLogger(__name__)

_WORTH = 1.25  # times as fast: what all threads must make of a step
_RUNS = 5


class StepThreads:
    """For the steps of one rank."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._small = 0  # tokens: steps with at most so many take one thread

    def measure(self, run: Callable[[int], None], sizes: Sequence[int]) -> None:
        """Find out which steps are small. run: carries out a step of so many tokens; sizes: some of these, rising."""
        if self._num_threads == 1:
            return
        for size in sizes:
            alone_s, together_s = self._seconds(run, size, 1), self._seconds(run, size, self._num_threads)
            if alone_s > _WORTH * together_s:
                break
            self._small = size
        log.info("steps of up to %d tokens take one of %d threads", self._small, self._num_threads)

    def _seconds(self, run: Callable[[int], None], size: int, num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        run(size)
        took_s = []
        for _ in range(_RUNS):
            began_s = time.perf_counter()
            run(size)
            took_s.append(time.perf_counter() - began_s)
        return statistics.median(took_s)

    def set_for(self, num_tokens: int) -> None:
        """For the step that this thread is about to compute."""
        wanted = 1 if num_tokens <= self._small else self._num_threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
