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
import math
import time
from typing import Protocol

from kvstore.control.directory import Directory, WorkerRecord
from workers.server.lease import LeaseKeeper

log = logging.getLogger(__name__)

_SETTLE_S = 1.0  # a router that does not answer may send requests until it looks into the directory again
_LOOK_S = 0.05


class Phase(enum.Enum):
    """What a worker is to routers."""

    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    SWITCHED = "switched"


class NotDrained(Exception):
    """The worker still serves, so it cannot take another role."""


class Routers(Protocol):
    """The routers of one worker, as WorkerServicer knows them. For the server's loop."""

    @property
    def num_requests(self) -> int:
        """How many of theirs run here."""

    @property
    def is_quiet(self) -> bool:
        """They all know that the worker retired."""

    def lease(self, epoch: int, is_new: bool) -> None:
        """See LeaseKeeper."""

    def take_role(self, record: WorkerRecord) -> None:
        """The worker has another role, under which it will be announced."""

    def retire(self) -> None:
        """Tell them that the worker takes no more requests."""

    def move_streams(self) -> None:
        """End the connections that streams run over, so that they are placed elsewhere."""


class Registration:
    """One worker's place in the cluster. directory: None where a worker serves without one."""

    def __init__(self, directory: Directory | None, record: WorkerRecord, routers: Routers) -> None:
        self.record = record
        """As it is, or will be, in the directory."""
        self._routers = routers
        self._asyncio = asyncio.get_running_loop()
        self._lease = None if directory is None else LeaseKeeper(directory, routers.lease, self._asyncio)
        self._serves = directory is None  # without one there is no way out: announce and drain change nothing
        self._is_over = False
        self._left_s = 0.0
        self._is_switched = False
        self._entry_of_retired: asyncio.Task[None] | None = None
        self._end_of_drain: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()  # calls come one after the other

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        if self._serves and not self._is_over:
            return Phase.READY
        if self._is_switched:
            return Phase.SWITCHED
        is_settled = self._routers.is_quiet or time.monotonic() - self._left_s >= _SETTLE_S
        return Phase.DRAINED if is_settled and not self._routers.num_requests else Phase.DRAINING

    @property
    def num_requests(self) -> int:
        """How many run here."""
        return self._routers.num_requests

    async def announce(self) -> None:
        """Take requests: enter the directory under a new epoch, unless it is there or has left for good.

        Raises DirectoryUnavailable when the entry as retired cannot be removed: routers would not see the new one.
        """
        async with self._lock:
            if self._serves or self._is_over or self._lease is None:
                return
            if self._entry_of_retired is not None:
                await asyncio.wait([self._entry_of_retired])
            was_switched = self._is_switched
            self._serves, self._is_switched = True, False  # before routers can see it
            try:
                await asyncio.to_thread(self._lease.register, self.record)
            except BaseException:
                self._serves, self._is_switched = False, was_switched
                raise
            self._stop_waiting()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; returns at once. After timeout_s what still runs is moved.

        Routers get the retirement over their connections. The directory may not answer, so a task of its own writes it.
        """
        async with self._lock:
            if self._serves and self._lease is not None:
                self._serves, self._left_s = False, math.inf
                self._routers.retire()
                self._entry_of_retired = asyncio.create_task(asyncio.to_thread(self._lease.retire), name="retired")
                self._entry_of_retired.add_done_callback(self._note_left)
            self._stop_waiting()
            if not self._serves and not self._is_switched:
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
            self._routers.take_role(self.record)

    def withdraw(self) -> None:
        """Leave the directory for good; from any thread."""
        self._is_over, self._left_s = True, math.inf
        if self._lease is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
                self._asyncio.call_soon_threadsafe(self._routers.retire)
            self._lease.withdraw()
        self._left_s = time.monotonic()

    def _note_left(self, task: asyncio.Task[None]) -> None:
        """The directory has been told, or does not answer; then routers cannot look into it either."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the directory was not told of a drain", exc_info=error)
        self._left_s = time.monotonic()

    async def _move_when_over(self, timeout_s: float) -> None:
        """Until the worker is drained, or an announcement has ended this. While one is tried the phase is READY."""
        deadline_s = time.monotonic() + timeout_s
        while (phase := self.phase) in (Phase.DRAINING, Phase.READY):
            if phase is Phase.DRAINING and time.monotonic() >= deadline_s:
                self._routers.move_streams()  # again and again: a router may still have sent something
            await asyncio.sleep(_LOOK_S)

    def _stop_waiting(self) -> None:
        if self._end_of_drain is not None:
            self._end_of_drain.cancel()
            self._end_of_drain = None
