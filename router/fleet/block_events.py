"""Follows the block events of one worker, over a call of its own beside the stream of tokens.

A failure of this call never ends the connection: the router guesses and asks again. Knows nothing of placement or of
what the names are good for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NoReturn, Protocol

import grpc
from switchyard.v1 import worker_pb2, worker_pb2_grpc

from router.fleet.messages import block_event
from router.placement.affinity import BlockEvent

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.02, 5.0


class BlockListener(Protocol):
    """Takes block events. Called from the event loop; must not block."""

    def on_blocks(self, worker_id: str, event: BlockEvent) -> bool:
        """False: an event is missing, so the caller must ask for a snapshot."""

    def on_blocks_lost(self, worker_id: str) -> None: ...


async def watch_blocks(stub: worker_pb2_grpc.WorkerServiceStub, worker_id: str, events: BlockListener) -> NoReturn:
    """Ask for a snapshot, follow the changes, and begin again whenever that ends; until cancelled."""
    backoff_s = _FIRST_BACKOFF_S
    while True:
        began_s = time.monotonic()
        try:
            await _follow(stub, worker_id, events)
            log.info("worker %s: a block event is missing, asking for a snapshot", worker_id)
        except grpc.aio.AioRpcError as error:
            log.info("worker %s sends no block events: %s", worker_id, error.code().name)
        except Exception:  # placement is worse without; streams are not to end because of it
            log.exception("worker %s: its block events cannot be followed", worker_id)
        finally:
            events.on_blocks_lost(worker_id)
        if time.monotonic() - began_s > _LAST_BACKOFF_S:
            backoff_s = _FIRST_BACKOFF_S
        await asyncio.sleep(backoff_s)
        backoff_s = min(_LAST_BACKOFF_S, 2 * backoff_s)


async def _follow(stub: worker_pb2_grpc.WorkerServiceStub, worker_id: str, events: BlockListener) -> None:
    """Returns when an event is missing."""
    call = stub.WatchBlocks(worker_pb2.WatchBlocksRequest())
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.WhichOneof("message") == "snapshot" and message.snapshot.worker_id != worker_id:
                return  # another process has the address now; the connection ends too
            event = block_event(message)
            if event is None:
                continue
            if not events.on_blocks(worker_id, event):
                return
    finally:
        call.cancel()
