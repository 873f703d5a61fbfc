"""The part of WorkerService by which an autoscaler moves a worker: drain, another role, back into the directory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

import grpc
from switchyard.v1 import worker_pb2 as pb
from switchyard.v1 import worker_pb2_grpc

from kvstore.control.directory import DirectoryUnavailable, WorkerRecord
from kvstore.control.roles import ROLE_NAMES, WIRE_ROLES
from workers.engine.engine import Clock
from workers.server.registration import NotDrained, Phase, Registration

_PHASES = {
    Phase.READY: pb.WORKER_PHASE_READY,
    Phase.DRAINING: pb.WORKER_PHASE_DRAINING,
    Phase.DRAINED: pb.WORKER_PHASE_DRAINED,
    Phase.SWITCHED: pb.WORKER_PHASE_SWITCHED,
}


class RegistrationServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Base of WorkerServicer, since gRPC wants one class per service. hello: as routers get it, kept up to date."""

    def __init__(self, hello: pb.WorkerHello, clock: Clock) -> None:
        self._hello = hello
        self._clock = clock
        self._began_s = clock()
        self._registration: Registration | None = None
        self._changes: set[asyncio.Task[None]] = set()

    def take_role(self, record: WorkerRecord) -> None:
        """Say so to routers from now on."""
        self._hello.role = WIRE_ROLES[record.role]

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        """Leave the directory."""
        if not 0 <= request.timeout_s < math.inf:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"timeout_s: must be >= 0, not {request.timeout_s}")
        await self._to_its_end(self._attached.drain(request.timeout_s))
        return self._status()

    async def SwitchRole(self, request: pb.SwitchRoleRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        """Take another pool and role."""
        role = ROLE_NAMES.get(request.role, "")
        if not role or not request.pool:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "pool and role: both must be given")
        try:
            await self._to_its_end(self._attached.switch(request.pool, role))
        except NotDrained as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return self._status()

    async def Announce(self, request: pb.AnnounceRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        """Enter the directory."""
        try:
            await self._to_its_end(self._attached.announce())
        except DirectoryUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the directory does not answer: {error}")
        return self._status()

    async def _to_its_end(self, change: Coroutine[Any, Any, None]) -> None:
        """Also if the call is cancelled: a worker with half of a change would neither serve nor be drained."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    @property
    def _attached(self) -> Registration:
        assert self._registration is not None, "attach() comes first"
        return self._registration

    def _status(self) -> pb.WorkerStatus:
        return pb.WorkerStatus(
            phase=_PHASES[self._attached.phase],
            pool=self._attached.record.pool,
            role=self._hello.role,
            lease_epoch=self._hello.lease_epoch,
            num_requests=self._attached.num_requests,
            age_seconds=self._clock() - self._began_s,
        )
