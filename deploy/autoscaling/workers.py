"""Client of all workers of a cluster: finds them in the directory, and asks each for its load and status.

Commands them to drain, to take another role, and to serve again. Knows nothing of Serve or of plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from switchyard.v1 import worker_pb2, worker_pb2_grpc

from kvstore.control.directory import Directory, DirectoryUnavailable, LeasedWorker
from kvstore.control.roles import WIRE_ROLES
from kvstore.network.channels import dial

_TIMEOUT_S = 2.0
_THREADS = 16


class WorkerUnavailable(Exception):
    """A worker does not answer, or refuses a command; the message is one line."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one worker last reported."""

    leased: LeasedWorker
    answer: worker_pb2.GetLoadResponse
    at_s: float
    """On the watch's clock."""

    @property
    def status(self) -> worker_pb2.WorkerStatus:
        """Where it stands."""
        return self.answer.status


class WorkerWatch:
    """The workers of one cluster."""

    def __init__(self, directory: Directory, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._reports: dict[str, WorkerReport] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="workers")
        self.problem = ""
        """Why the directory does not answer; "" when it does. What was seen last stays."""

    def poll(self) -> dict[str, WorkerReport]:
        """All workers with a lease, by id; of one that does not answer, what it said last."""
        try:
            leased = self._directory.workers()
            self.problem = ""
        except DirectoryUnavailable as error:
            self.problem = str(error)
            leased = [report.leased for report in self._reports.values()]
        seen = {report.leased.record.worker_id: report for report in self._ask_all(leased)}
        ids = {entry.record.worker_id for entry in leased}
        self._reports = {name: report for name, report in self._reports.items() if name in ids} | seen
        return dict(self._reports)

    def _ask_all(self, leased: Iterable[LeasedWorker]) -> list[WorkerReport]:
        return [report for report in self._threads.map(self._ask, leased) if report is not None]

    def _ask(self, leased: LeasedWorker) -> WorkerReport | None:
        try:
            with dial(leased.record.address) as channel:
                stub = worker_pb2_grpc.WorkerServiceStub(channel)
                answer = stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return None
        return WorkerReport(leased, answer, self._clock())

    # ---- commands to a worker; each raises WorkerUnavailable

    def drain(self, worker_id: str, timeout_s: float) -> None:
        """Take no more requests; what runs after timeout_s is moved."""
        self._call(worker_id, lambda stub: stub.Drain(worker_pb2.DrainRequest(timeout_s=timeout_s), timeout=_TIMEOUT_S))

    def switch(self, worker_id: str, pool: str, role: str) -> None:
        """Serve in another pool from the next announcement on."""
        order = worker_pb2.SwitchRoleRequest(pool=pool, role=WIRE_ROLES[role])
        self._call(worker_id, lambda stub: stub.SwitchRole(order, timeout=_TIMEOUT_S))

    def announce(self, worker_id: str) -> None:
        """Take requests."""
        self._call(worker_id, lambda stub: stub.Announce(worker_pb2.AnnounceRequest(), timeout=_TIMEOUT_S))

    def _call(self, worker_id: str, call: Callable[[worker_pb2_grpc.WorkerServiceStub], object]) -> None:
        report = self._reports.get(worker_id)
        if report is None:
            raise WorkerUnavailable(f"{worker_id}: is not in the directory")
        try:
            with dial(report.leased.record.address) as channel:
                call(worker_pb2_grpc.WorkerServiceStub(channel))
        except grpc.RpcError as error:
            raise WorkerUnavailable(f"{worker_id}: {error.code().name}: {error.details()}") from None

    def close(self) -> None:
        """Give up threads and the directory."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._directory.close()
