"""A worker's lease in the directory, and the epoch that it goes by.

A worker that could not reach the directory, or whose directory forgot, asks for the epoch that it had: it never
stopped, so nobody need treat it as another. One that stopped for long enough to lose its lease does not ask, and is new
when the lease is gone. Knows nothing of routers or of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from kvstore.control.directory import RETIRED, Directory, DirectoryUnavailable, WorkerRecord

log = logging.getLogger(__name__)

LEASE_TTL_S = 3.0
LEASE_RENEWAL_S = 0.75
LEASE_PULSE_S = 0.25


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

    def forget(self) -> None:
        """What follows is a registration like the first one."""
        with self._lock:
            self.epoch = self._held_epoch = 0

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


class LeaseKeeper:
    """A worker's entry in the directory: renewed from a thread of its own, while the server's loop shows by a pulse
    that the process runs. Thread-safe; what is asked for comes one after the other.

    on_epoch: called on that loop with the epoch after each renewal, and whether what was begun before it is over.
    """

    def __init__(
        self,
        directory: Directory,
        on_epoch: Callable[[int, bool], None],
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._on_epoch = on_epoch
        self._loop = loop
        self._lease = Lease(LEASE_TTL_S, clock)
        self._record: WorkerRecord | None = None
        self._lock = threading.Lock()
        self._withdrawn = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    def register(self, record: WorkerRecord) -> None:
        """Enter the directory under a new epoch, and renew from now on; nothing after withdraw().

        A first entry that the directory does not take is tried again. Raises DirectoryUnavailable when it is not the
        first, and then nothing has changed: the directory would take the old epoch for the new one.
        """
        with self._lock:
            if self._withdrawn.is_set():
                return
            if self._record is not None:
                self._directory.withdraw(record.worker_id)
                self._lease.forget()
            self._record = record
            if self._thread.ident is None:
                asyncio.run_coroutine_threadsafe(self._pulse(), self._loop)
                self._thread.start()  # it waits for the lock
            self._renew()

    def retire(self) -> None:
        """Stay in the directory, under the same epoch, as one that takes no requests."""
        with self._lock:
            if self._record is not None and not self._withdrawn.is_set():
                self._record = dataclasses.replace(self._record, role=RETIRED)
                self._renew()

    def withdraw(self) -> None:
        """Leave the directory for good."""
        self._withdrawn.set()
        with self._lock:
            record, self._record = self._record, None
        if record is None:
            return
        self._thread.join()
        try:
            self._directory.withdraw(record.worker_id)
        except DirectoryUnavailable as error:
            log.warning("control is away: %s", error)

    def _renew(self) -> None:
        assert self._record is not None
        before = self._lease.epoch
        try:
            is_new = self._lease.renew(self._directory, self._record)
        except DirectoryUnavailable as error:
            log.warning("control is away: %s", error)
            return
        epoch = self._lease.epoch
        if is_new:
            log.warning("this worker stopped for longer than its lease: epoch %d follows %d", epoch, before)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
            self._loop.call_soon_threadsafe(self._on_epoch, epoch, is_new)

    async def _pulse(self) -> None:
        while not self._withdrawn.is_set():
            self._lease.pulse()
            await asyncio.sleep(LEASE_PULSE_S)

    def _keep_alive(self) -> None:
        while not self._withdrawn.wait(LEASE_RENEWAL_S):
            try:
                with self._lock:
                    if self._record is not None:
                        self._renew()
            except Exception:  # without renewals the worker's lease ends, and the cluster loses it
                log.exception("the lease was not renewed")
