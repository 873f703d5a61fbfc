"""StatusService: what this router knows of the cluster. Maps readiness and loads to protobuf."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from switchyard.v1 import status_pb2, status_pb2_grpc, worker_pb2

from kvstore.control.redis_decision_log import DecisionsUnavailable, RedisDecisionLog
from kvstore.control.roles import WIRE_ROLES
from router.service.dispatch import Dispatcher
from router.service.readiness import Readiness

SERVICE = status_pb2.DESCRIPTOR.services_by_name["StatusService"].full_name
_MAX_DECISIONS = 100


class StatusServicer(status_pb2_grpc.StatusServiceServicer):
    """decisions: None where the autoscaler has no place to write them."""

    def __init__(
        self,
        readiness: Callable[[], Readiness],
        dispatcher: Dispatcher,
        num_inflight: Callable[[], int],
        decisions: RedisDecisionLog | None,
    ) -> None:
        self._readiness = readiness
        self._dispatcher = dispatcher
        self._num_inflight = num_inflight
        self._decisions = decisions

    async def GetStatus(
        self,
        request: status_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[status_pb2.GetStatusRequest, status_pb2.GetStatusResponse],
    ) -> status_pb2.GetStatusResponse:
        """The cluster now."""
        state = self._readiness()
        return status_pb2.GetStatusResponse(
            cluster=state.cluster,
            model=state.model,
            is_ready=state.is_ready,
            is_degraded=state.is_degraded,
            directory_is_up=state.directory_is_up,
            streams_can_resume=state.streams_can_resume,
            num_inflight_requests=self._num_inflight(),
            workers=self._workers(state),
            workers_refused=[
                status_pb2.RefusedWorker(worker_id=w.worker_id, address=w.address, reason=w.reason)
                for w in state.workers_refused
            ],
            decisions=await self._last_decisions(request.num_decisions),
        )

    def _workers(self, state: Readiness) -> list[status_pb2.ListedWorker]:
        num_blocks = {info.worker_id: info.num_blocks for info in self._dispatcher.fleet.workers}
        return [
            status_pb2.ListedWorker(
                worker_id=worker.worker_id,
                pool=worker.pool,
                role=WIRE_ROLES[worker.role],
                address=worker.address,
                num_blocks=num_blocks.get(worker.worker_id, 0),
                load=self._dispatcher.loads.get(worker.worker_id, worker_pb2.WorkerLoad()),
            )
            for worker in state.workers
        ]

    async def _last_decisions(self, count: int) -> list[str]:
        if self._decisions is None or not count:
            return []
        try:
            lines = await asyncio.to_thread(self._decisions.last, min(count, _MAX_DECISIONS) + 1)
        except DecisionsUnavailable:
            return []  # directory_is_up says that the Redis is away
        return [line for line in lines if line.startswith('{"decision"')][-count:]
