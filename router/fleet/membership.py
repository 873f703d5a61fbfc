"""Who is in the cluster: polls the directory in a thread and keeps one connection per worker that has a lease.

A worker that loses its lease gets nothing new but keeps its connection while streams run over it. A worker whose
connection breaks is out at once, whatever the directory says. A worker that registered anew had lost its lease: its old
connection is dropped, and entries with an older epoch do not count. While the directory is away nothing changes: known
workers stay. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvstore.control.directory import RETIRED, Directory, DirectoryUnavailable, LeasedWorker
from router.fleet.fleet import Fleet
from router.fleet.worker_connection import ConnectionOptions, WorkerConnection, WorkerListener, end_task

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Member:
    connection: WorkerConnection
    task: asyncio.Task[None]


class Membership:
    """The connections of one router, kept in step with the directory."""

    def __init__(
        self, directory: Directory, fleet: Fleet, events: WorkerListener, options: ConnectionOptions, poll_s: float
    ) -> None:
        self._directory = directory
        self._fleet = fleet
        self._events = events
        self._options = options
        self._poll_s = poll_s
        self._members: dict[str, _Member] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="directory")
        self.directory_is_up = True  # until a poll shows otherwise
        self.on_change: Callable[[], None] = lambda: None

    @property
    def refusals(self) -> list[tuple[str, str, str]]:
        """Workers of the directory that are not used: id, address, and why."""
        connections = (member.connection for member in self._members.values())
        return [
            (connection.worker_id, connection.address, connection.refusal)
            for connection in connections
            if connection.refusal
        ]

    async def run(self) -> None:
        """Poll until cancelled; then all connections are closed."""
        try:
            while True:
                await self._poll()
                await asyncio.sleep(self._poll_s)
        finally:
            await asyncio.gather(*(end_task(member.task) for member in self._members.values()))
            self._members.clear()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _poll(self) -> None:
        try:
            leased = await asyncio.get_running_loop().run_in_executor(self._thread, self._directory.workers)
        except DirectoryUnavailable as error:
            if self.directory_is_up:
                log.warning("the directory is away, the known workers stay: %s", error)
            self._set_directory(is_up=False)
            return
        self._set_directory(is_up=True)
        await self._follow(leased)

    def _set_directory(self, is_up: bool) -> None:
        if is_up != self.directory_is_up:
            self.directory_is_up = is_up
            self.on_change()

    async def _follow(self, leased: Sequence[LeasedWorker]) -> None:
        workers = {entry.record.worker_id: entry for entry in leased}
        for worker_id, member in list(self._members.items()):
            entry = workers.get(worker_id)
            if entry is not None and entry.epoch < member.connection.lease_epoch and not member.task.done():
                continue  # the directory's entry is older than the worker's hello, or its memory was lost
            if entry is not None and entry.epoch > member.connection.lease_epoch:
                log.warning("worker %s registered anew, its old connection is dropped", worker_id)
                await self._drop(worker_id, member)
                continue
            is_there = entry is not None and entry.record.address == member.connection.address
            # What the directory said may be older than what the worker has said since.
            is_retired = member.connection.is_retired or (entry is not None and _is_retired(entry))
            is_wanted = is_there and not is_retired
            member.connection.stays = is_wanted
            self._fleet.retire(worker_id, not is_wanted)
            if member.task.done():
                if not member.task.cancelled() and (error := member.task.exception()) is not None:
                    log.error("the connection to worker %s failed and is made anew", worker_id, exc_info=error)
                del self._members[worker_id]
            elif not is_wanted and member.connection.num_streams == 0:
                member.task.cancel()
        for worker_id, entry in workers.items():
            if worker_id not in self._members and not _is_retired(entry):
                connection = WorkerConnection(entry, self._options, self._events)
                self._members[worker_id] = _Member(
                    connection, asyncio.create_task(connection.run(), name=f"connection {worker_id}")
                )

    async def _drop(self, worker_id: str, member: _Member) -> None:
        """End a connection whole before another one replaces it."""
        member.task.cancel()
        await asyncio.wait([member.task])
        del self._members[worker_id]


def _is_retired(entry: LeasedWorker) -> bool:
    return entry.record.role == RETIRED
