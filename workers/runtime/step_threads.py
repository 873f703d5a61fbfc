"""How many threads a step on a CPU computes with: all that it may, or one where more save too little.

A step on several threads waits for the slowest of them at every operation, so also for what the server, the router and
other workers compute meanwhile on one of the cores. On one thread it leaves them the others. All threads pay where they
save more than that work. Chosen once, by a measurement at start. Knows nothing of models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

log = logging.getLogger(__name__)

_OTHERS_S, _OTHERS_TOKEN_S = 0.001, 0.0002  # what others compute for a step, and for each of its tokens
_RUNS = 5
_SHORT_CONTEXT = 2048  # tokens: steps are measured without one, and a long one is work for all threads


class StepThreads:
    """For the steps of one rank."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._small = 0  # tokens: steps with at most so many take one thread

    def measure(
        self, run: Callable[[int], None], sizes: Sequence[int], agree: Callable[[int], int] = lambda count: count
    ) -> None:
        """Find out which steps are small. run: carries out a step of so many tokens; sizes: some of these, rising.

        Every rank of a worker runs the same steps, since they have collectives in them. agree: the least of all ranks'
        numbers.
        """
        if self._num_threads == 1:
            return
        num_small = 0
        for index, size in enumerate(sizes):
            alone_s, together_s = self._seconds(run, size, 1), self._seconds(run, size, self._num_threads)
            if num_small == index and alone_s <= together_s + _OTHERS_S + _OTHERS_TOKEN_S * size:
                num_small += 1
        num_small = agree(num_small)
        self._small = sizes[num_small - 1] if num_small else 0
        log.info("steps of up to %d tokens take one of %d threads", self._small, self._num_threads)

    def _seconds(self, run: Callable[[int], None], size: int, num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        run(size)
        took_s = []
        for _ in range(_RUNS):
            began_s = time.perf_counter()
            run(size)
            took_s.append(time.perf_counter() - began_s)
        return min(took_s)  # a machine's other work only adds

    @property
    def vary(self) -> bool:
        """Whether some steps take one thread; else there is nothing to set."""
        return self._small > 0

    def set_for(self, num_tokens: int, longest_context: int) -> None:
        """For the step that this thread is about to compute. longest_context: tokens of its longest sequence."""
        is_small = num_tokens <= self._small and longest_context <= _SHORT_CONTEXT
        wanted = 1 if is_small else self._num_threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
