"""What the workers say of themselves: the directory tells where they are, and each is asked for load and status.

Also tells them to drain, to take another role, and to serve again. Knows nothing of Serve or of plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from switchyard.v1 import worker_pb2, worker_pb2_grpc

from kvstore.control.directory import Directory, DirectoryUnavailable, LeasedWorker
from kvstore.network.channels import dial

_TIMEOUT_S = 2.0
_THREADS = 16
_ROLES = {
    "mixed": worker_pb2.WORKER_ROLE_MIXED,
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
}


class WorkerUnavailable(Exception):
    """A worker does not do what it was told; the message is one line."""


@dataclass(frozen=True, slots=True)
class WorkerSight:
    """One worker as it was last seen."""

    leased: LeasedWorker
    said: worker_pb2.GetLoadResponse
    at_s: float
    """On the watch's clock."""

    @property
    def status(self) -> worker_pb2.WorkerStatus:
        """Where it stands."""
        return self.said.status


class WorkerWatch:
    """The workers of one cluster."""

    def __init__(self, directory: Directory, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._sights: dict[str, WorkerSight] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="workers")
        self.problem = ""
        """Why the directory does not answer; "" when it does. What was seen last stays."""

    def look(self) -> dict[str, WorkerSight]:
        """All workers with a lease, by id; of one that does not answer, what it said last."""
        try:
            leased = self._directory.workers()
            self.problem = ""
        except DirectoryUnavailable as error:
            self.problem = str(error)
            leased = [sight.leased for sight in self._sights.values()]
        seen = {sight.leased.record.worker_id: sight for sight in self._ask_all(leased)}
        ids = {entry.record.worker_id for entry in leased}
        self._sights = {name: sight for name, sight in self._sights.items() if name in ids} | seen
        return dict(self._sights)

    def _ask_all(self, leased: Iterable[LeasedWorker]) -> list[WorkerSight]:
        return [sight for sight in self._threads.map(self._ask, leased) if sight is not None]

    def _ask(self, leased: LeasedWorker) -> WorkerSight | None:
        try:
            with dial(leased.record.address) as channel:
                stub = worker_pb2_grpc.WorkerServiceStub(channel)
                said = stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return None
        return WorkerSight(leased, said, self._clock())

    # ---- what they are told; each raises WorkerUnavailable

    def drain(self, worker_id: str, timeout_s: float) -> None:
        """Take no more requests; what runs after timeout_s is moved."""
        self._tell(worker_id, lambda stub: stub.Drain(worker_pb2.DrainRequest(timeout_s=timeout_s), timeout=_TIMEOUT_S))

    def switch(self, worker_id: str, pool: str, role: str) -> None:
        """Serve in another pool from the next announcement on."""
        order = worker_pb2.SwitchRoleRequest(pool=pool, role=_ROLES[role])
        self._tell(worker_id, lambda stub: stub.SwitchRole(order, timeout=_TIMEOUT_S))

    def announce(self, worker_id: str) -> None:
        """Take requests."""
        self._tell(worker_id, lambda stub: stub.Announce(worker_pb2.AnnounceRequest(), timeout=_TIMEOUT_S))

    def _tell(self, worker_id: str, call: Callable[[worker_pb2_grpc.WorkerServiceStub], object]) -> None:
        sight = self._sights.get(worker_id)
        if sight is None:
            raise WorkerUnavailable(f"{worker_id}: is not in the directory")
        try:
            with dial(sight.leased.record.address) as channel:
                call(worker_pb2_grpc.WorkerServiceStub(channel))
        except grpc.RpcError as error:
            raise WorkerUnavailable(f"{worker_id}: {error.code().name}: {error.details()}") from None

    def close(self) -> None:
        """Give up threads and the directory."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._directory.close()
