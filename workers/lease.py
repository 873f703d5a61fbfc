"""A worker's lease in the directory, and the epoch that it goes by.

A worker that could not reach the directory, or whose directory forgot, asks for the epoch that it had: it never
stopped, so nobody need treat it as another. One that stopped for long enough to lose its lease does not ask, and is new
when the lease is gone. Knows nothing of who calls it, of routers or of requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvstore.directory import Directory, WorkerRecord


class Lease:
    """Thread-safe. pulse() is called all the time, far more often than ttl_s; its absence is how a stop shows."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self.epoch = 0  # 0: not registered yet
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._pulse_s = clock()
        self._num_stops = 0
        self._held_epoch = 0  # what it asks for when the lease is gone

    def pulse(self) -> None:
        """This process runs."""
        with self._lock:
            now_s = self._clock()
            # The last renewal was a while before the stop, so a shorter one than ttl_s may have cost the lease. If it
            # did not, the directory still has it, and its epoch stays.
            if now_s - self._pulse_s > self._ttl_s / 2:
                self._num_stops += 1
                self._held_epoch = 0
            self._pulse_s = now_s

    def renew(self, directory: Directory, record: WorkerRecord) -> bool:
        """Register, or renew. True: another epoch than before, what was begun under that is over.

        Raises DirectoryUnavailable, and then nothing has changed.
        """
        self.pulse()
        num_stops = self._num_stops
        epoch = directory.keep_alive(record, self._ttl_s, self._held_epoch)
        self.pulse()
        with self._lock:
            if self._num_stops == num_stops:  # otherwise the answer may be older than the stop
                self._held_epoch = epoch
            before, self.epoch = self.epoch, epoch
        return before not in (0, epoch)
