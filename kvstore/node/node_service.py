"""The two gRPC services of a node process: its arena, and the directory of a cluster without Redis.

Knows nothing of processes and sockets. `ClusterGuard` refuses the callers of other clusters.
"""

from collections.abc import Callable
from dataclasses import asdict

import grpc
from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvstore.control.directory import MemoryDirectory
from kvstore.control.remote_directory import worker_message, worker_record
from kvstore.network.channels import CLUSTER_METADATA
from kvstore.node.node_slots import NodeSlots


class KVNodeServicer(kvnode_pb2_grpc.KVNodeServiceServicer):
    """Tells workers where the arena and its slot calls are, and reports counters."""

    def __init__(self, slots: NodeSlots, node_id: str, peer_address: str = "") -> None:
        self._slots = slots
        self._node_id = node_id
        self._peer_address = peer_address
        self.call_address = ""
        """Where the slot calls are answered; set before serving."""

    def GetArena(
        self, request: kvnode_pb2.GetArenaRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.GetArenaResponse:
        """See kvnode.proto."""
        arena, disk = self._slots.arena, self._slots.disk
        return kvnode_pb2.GetArenaResponse(
            path=str(arena.path),
            slot_bytes=arena.slot_bytes,
            num_slots=arena.num_slots,
            node_id=self._node_id,
            num_sealed=self._slots.stats().num_sealed,
            peer_address=self._peer_address,
            call_address=self.call_address,
            has_disk=disk is not None,
            disk_problem=disk.problem if disk is not None else "",
        )

    def GetStats(
        self, request: kvnode_pb2.GetStatsRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.GetStatsResponse:
        """See kvnode.proto."""
        stats = self._slots.stats()
        return kvnode_pb2.GetStatsResponse(
            num_sealed=stats.num_sealed,
            num_promoted=stats.num_promoted,
            num_promotions_late=stats.num_promotions_late,
            rejected=stats.rejected,
            disk=kvnode_pb2.DiskStats(**asdict(stats.disk)) if stats.disk is not None else None,
        )


class ControlServicer(kvnode_pb2_grpc.ControlServiceServicer):
    """Serves a directory that is kept in this process."""

    def __init__(self, directory: MemoryDirectory) -> None:
        self._directory = directory

    def KeepAlive(
        self, request: kvnode_pb2.KeepAliveRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.KeepAliveResponse:
        """See kvnode.proto."""
        try:
            epoch = self._directory.keep_alive(worker_record(request.worker), request.ttl_s, request.held_epoch)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return kvnode_pb2.KeepAliveResponse(epoch=epoch)

    def Withdraw(
        self, request: kvnode_pb2.WithdrawRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.WithdrawResponse:
        """See kvnode.proto."""
        self._directory.withdraw(request.worker_id)
        return kvnode_pb2.WithdrawResponse()

    def ListWorkers(
        self, request: kvnode_pb2.ListWorkersRequest, context: grpc.ServicerContext
    ) -> kvnode_pb2.ListWorkersResponse:
        """See kvnode.proto."""
        workers = self._directory.workers()
        return kvnode_pb2.ListWorkersResponse(
            workers=[worker_message(worker.record) for worker in workers], epochs=[worker.epoch for worker in workers]
        )

    def Publish(self, request: kvnode_pb2.PublishRequest, context: grpc.ServicerContext) -> kvnode_pb2.PublishResponse:
        """See kvnode.proto."""
        self._directory.publish(request.block_names, request.location)
        return kvnode_pb2.PublishResponse()

    def Locate(self, request: kvnode_pb2.LocateRequest, context: grpc.ServicerContext) -> kvnode_pb2.LocateResponse:
        """See kvnode.proto."""
        locations = self._directory.locate(request.block_names)
        return kvnode_pb2.LocateResponse(locations=[kvnode_pb2.Locations(names=sorted(names)) for names in locations])


class ClusterGuard(grpc.ServerInterceptor):  # type: ignore[misc]  # unannotated
    """Refuses the callers of other clusters, who would take this host's blocks and leases for their own."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """As in grpc.ServerInterceptor."""
        caller = dict(details.invocation_metadata).get(CLUSTER_METADATA, "")
        if caller == self._cluster:
            return continuation(details)
        message = f"this KV node is of cluster {self._cluster!r}, the caller of {caller!r}"

        def refuse(request: object, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)

        return grpc.unary_unary_rpc_method_handler(refuse)
