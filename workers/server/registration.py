"""Whether routers may use this worker, and as what: its lease, its drain, its role.

    ready -> draining -> drained -> (switched ->) ready

A drained worker keeps its weights and its cache, so it can serve in another pool of the same shape at once. It stays in
the directory as retired, where an autoscaler finds it. Every way back is a new registration with a new epoch: routers
drop what they knew of the worker before.
Lives on the server's loop; calls to the directory, which may hang, run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import time
from collections.abc import Callable

from kvstore.control.directory import Directory, WorkerRecord
from workers.server.lease import LeaseKeeper

log = logging.getLogger(__name__)

_SETTLE_S = 1.0  # a router that does not answer may send requests until its next look into the directory
_LOOK_S = 0.05


class Phase(enum.Enum):
    """What a worker is to routers."""

    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    SWITCHED = "switched"


class NotDrained(Exception):
    """The worker still serves, so it cannot take another role."""


class Registration:
    """One worker's place in the cluster.

    on_epoch: see LeaseKeeper. on_role: the role has changed, before routers hear of it. num_requests: how many run
    here. retire: tells routers that it has left. is_quiet: they all know. move_streams: ends the routers' connections,
    so that they place their streams elsewhere.
    """

    def __init__(
        self,
        directory: Directory | None,
        record: WorkerRecord,
        on_epoch: Callable[[int, bool], None],
        on_role: Callable[[WorkerRecord], None],
        num_requests: Callable[[], int],
        retire: Callable[[], None],
        is_quiet: Callable[[], bool],
        move_streams: Callable[[], None],
    ) -> None:
        self.record = record
        """As it is, or will be, in the directory."""
        self._directory = directory
        self._on_epoch = on_epoch
        self._on_role = on_role
        self._num_requests = num_requests
        self._retire = retire
        self._is_quiet = is_quiet
        self._move_streams = move_streams
        self._asyncio = asyncio.get_running_loop()
        self._lease: LeaseKeeper | None = None
        self._is_ready = directory is None  # nobody is told, so nothing can be left
        self._is_over = False
        self._left_s = 0.0
        self._is_switched = False
        self._end_of_drain: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # calls come one after the other

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        if self._is_ready:
            return Phase.READY
        if self._is_switched:
            return Phase.SWITCHED
        is_settled = self._is_quiet() or time.monotonic() - self._left_s >= _SETTLE_S
        return Phase.DRAINED if is_settled and not self._num_requests() else Phase.DRAINING

    @property
    def num_requests(self) -> int:
        """How many run here."""
        return self._num_requests()

    async def announce(self) -> None:
        """Take requests: enter the directory under a new epoch, unless it is there or has left for good."""
        async with self._lock:
            if self._is_ready or self._is_over or self._directory is None:
                return
            self._stop_waiting()
            if self._lease is not None:
                await asyncio.to_thread(self._lease.withdraw)
            self._lease = LeaseKeeper(self._directory, self.record, self._on_epoch, self._asyncio)
            self._is_ready, self._is_switched = True, False
            await asyncio.to_thread(self._lease.start)

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; returns at once. After timeout_s what still runs is moved."""
        async with self._lock:
            if self._is_ready and self._lease is not None:
                self._is_ready, self._left_s = False, time.monotonic()
                await asyncio.to_thread(self._lease.retire)
                self._left_s = time.monotonic()
                self._retire()
            self._stop_waiting()
            if not self._is_ready and not self._is_switched:
                self._end_of_drain = asyncio.create_task(self._move_when_over(timeout_s), name="drain")

    async def switch(self, pool: str, role: str) -> None:
        """Take another pool and role. Raises NotDrained."""
        async with self._lock:
            if (self.record.pool, self.record.role) == (pool, role):
                return
            if self.phase not in (Phase.DRAINED, Phase.SWITCHED):
                raise NotDrained(
                    f"{self.record.worker_id} is {self.phase.value}, and only a drained worker changes roles"
                )
            self._stop_waiting()
            log.info("%s: from pool %s to %s as %s", self.record.worker_id, self.record.pool, pool, role)
            self.record = dataclasses.replace(self.record, pool=pool, role=role)
            self._is_switched = True
            self._on_role(self.record)

    def withdraw(self) -> None:
        """Leave the directory for good; from any thread."""
        self._is_over, self._is_ready, self._left_s = True, False, time.monotonic()
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.withdraw()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
                self._asyncio.call_soon_threadsafe(self._retire)

    async def _move_when_over(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.phase is Phase.DRAINING and time.monotonic() < deadline_s:
            await asyncio.sleep(_LOOK_S)
        while self.phase is Phase.DRAINING:  # also what a router still sent meanwhile
            self._move_streams()
            await asyncio.sleep(_LOOK_S)

    def _stop_waiting(self) -> None:
        if self._end_of_drain is not None:
            self._end_of_drain.cancel()
            self._end_of_drain = None
