"""Whether one rank gets on with its steps: counted as it computes, read by the watch of the worker's ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """Of a moment."""

    sequence: int  # of the step in progress; 0: none
    count: int  # grows with every layer and every step
    is_waiting: bool  # for another rank: then its lack of progress is not its own


class StepProgress:
    """is_waiting: whether a thread, by its identifier, waits for another rank. Two threads may be in steps at once."""

    def __init__(self, is_waiting: Callable[[int], bool] = lambda _: False) -> None:
        self._is_waiting = is_waiting
        self._sequences: dict[int, int] = {}  # by thread
        self._count = 0

    @contextmanager
    def step(self, sequence: int) -> Iterator[None]:
        """Around what may take long in a step."""
        thread = threading.get_ident()
        self._sequences[thread] = sequence
        try:
            yield
        finally:
            del self._sequences[thread]
            self.note()

    def note(self) -> None:
        """It got on."""
        self._count += 1

    def report(self) -> ProgressReport:
        """Now; from any thread."""
        sequences = dict(self._sequences)
        busy = [thread for thread in sequences if not self._is_waiting(thread)]
        sequence = min((sequences[thread] for thread in busy or sequences), default=0)
        return ProgressReport(sequence, self._count, bool(sequences) and not busy)
