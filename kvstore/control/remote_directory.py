"""A directory that a node process keeps (memory://): the client's side of ControlService.

Knows nothing of how the directory is kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvstore.control.directory import DirectoryUnavailable, LeasedWorker, WorkerRecord, check_keep_alive
from kvstore.network.availability import Availability, one_line
from kvstore.network.channels import NODE_ERRORS, call, dial, probe


class RemoteDirectory:
    """Speaks to the node process at `address`, HOST:PORT or unix:PATH, which must be of the same cluster."""

    def __init__(self, address: str, cluster: str = "") -> None:
        self._address = address
        self._cluster = cluster
        self._channel = dial(address)
        self._stub = kvnode_pb2_grpc.ControlServiceStub(self._channel)
        self._availability = Availability(
            f"directory at {address}",
            check=lambda: call(self._stub.Locate, kvnode_pb2.LocateRequest(), cluster),
            probe=lambda: probe(self._stub.Locate, kvnode_pb2.LocateRequest(), cluster),
            errors=NODE_ERRORS,
        )

    def keep_alive(self, record: WorkerRecord, ttl_s: float, held_epoch: int = 0) -> int:
        """As in Directory."""
        check_keep_alive(record, ttl_s)
        request = kvnode_pb2.KeepAliveRequest(worker=worker_message(record), ttl_s=ttl_s, held_epoch=held_epoch)
        return int(self._call(self._stub.KeepAlive, request).epoch)

    def withdraw(self, worker_id: str) -> None:
        """As in Directory."""
        self._call(self._stub.Withdraw, kvnode_pb2.WithdrawRequest(worker_id=worker_id))

    def workers(self) -> list[LeasedWorker]:
        """As in Directory."""
        reply = self._call(self._stub.ListWorkers, kvnode_pb2.ListWorkersRequest())
        pairs = zip(reply.workers, reply.epochs, strict=True)
        return [LeasedWorker(worker_record(message), epoch) for message, epoch in pairs]

    def publish(self, block_names: Sequence[bytes], location: str) -> None:
        """As in Directory."""
        self._call(self._stub.Publish, kvnode_pb2.PublishRequest(block_names=block_names, location=location))

    def locate(self, block_names: Sequence[bytes]) -> list[frozenset[str]]:
        """As in Directory."""
        reply = self._call(self._stub.Locate, kvnode_pb2.LocateRequest(block_names=block_names))
        return [frozenset(locations.names) for locations in reply.locations]

    def close(self) -> None:
        """As in Directory."""
        self._availability.close(self._channel.close)

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        if not self._availability.is_up:
            why = self._availability.problem or "does not answer"
            raise DirectoryUnavailable(f"directory at {self._address}: {why}")
        try:
            return call(method, request, self._cluster)
        except NODE_ERRORS as error:
            self._availability.lost(error)
            raise DirectoryUnavailable(f"directory at {self._address}: {one_line(error)}") from error


def worker_message(record: WorkerRecord) -> kvnode_pb2.WorkerRecord:
    """The record as it goes over the wire."""
    return kvnode_pb2.WorkerRecord(
        worker_id=record.worker_id,
        address=record.address,
        pool=record.pool,
        role=record.role,
        node_id=record.node_id,
    )


def worker_record(message: kvnode_pb2.WorkerRecord) -> WorkerRecord:
    """The record as it came over the wire."""
    return WorkerRecord(message.worker_id, message.address, message.pool, message.role, message.node_id)
