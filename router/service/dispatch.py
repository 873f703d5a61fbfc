"""All live streams of a router, and the connections to workers that they run over (service.live_stream has one stream).

Knows nothing of text, of APIs, or of what a client may ask for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from switchyard.v1 import worker_pb2

from router.config import RouterConfig
from router.events import AdapterRef
from router.fleet.fleet import Fleet, WorkerInfo
from router.fleet.messages import load_report
from router.fleet.worker_connection import CLOSED, WorkerConnection
from router.placement.affinity import BlockEvent, SnapshotPart
from router.placement.policy import AdapterNeed
from router.service.dispatch_observer import DispatchObserver
from router.service.live_stream import LiveStream
from router.service.token_request import TokenRequest

log = logging.getLogger(__name__)


class Dispatcher:
    """All live streams of a router and the connections that they run over."""

    def __init__(
        self, fleet: Fleet, config: RouterConfig, clock: Callable[[], float], observer: DispatchObserver
    ) -> None:
        self.fleet = fleet
        self.config = config
        self.clock = clock
        self.observer = observer
        self.connections: dict[str, WorkerConnection] = {}  # those that are up
        self.loads: dict[str, worker_pb2.WorkerLoad] = {}
        self.waiting: set[asyncio.Event] = set()  # of requests that no worker is up for
        self.on_fleet_change: Callable[[], None] = lambda: None
        self.weights: Callable[[], str] = lambda: ""  # that the workers serve now
        self.is_loadable: Callable[[AdapterRef], bool] = lambda ref: True  # by a worker that does not hold it

    def open(self, request: TokenRequest, emitted: Sequence[int] = (), num_given: int = 0) -> LiveStream:
        """A stream, not yet placed. Ends with its close().

        emitted: its tokens so far, when it is resumed; the first num_given of them the reader has.
        """
        return LiveStream(self, request, emitted, num_given)

    def adapter_need(self, ref: AdapterRef | None) -> AdapterNeed | None:
        """What placement must know of a request's adapter."""
        return None if ref is None else AdapterNeed(ref.digest, self.is_loadable(ref))

    def pin(self, refs: Sequence[AdapterRef]) -> None:
        """Have the homes of these adapters keep them on their devices, and no others."""
        pinned: dict[str, list[AdapterRef]] = {worker_id: [] for worker_id in self.connections}
        for ref in refs:
            for worker_id in self.fleet.homes(ref.digest):
                if worker_id in pinned:
                    pinned[worker_id].append(ref)
        for worker_id, mine in pinned.items():
            self.connections[worker_id].pin(mine)

    async def wait_for_worker(self, woken: asyncio.Event, timeout_s: float) -> None:
        """Until a worker comes, or somebody sets the event, or so long. Clears the event."""
        self.waiting.add(woken)
        try:
            async with asyncio.timeout(timeout_s):
                await woken.wait()
            woken.clear()
        except TimeoutError:
            pass
        finally:
            self.waiting.discard(woken)

    def _wake_waiting(self) -> None:
        for woken in self.waiting:
            woken.set()

    # -- WorkerListener

    def on_up(self, connection: WorkerConnection, info: WorkerInfo) -> None:
        log.info("worker %s is up: %s in pool %s at %s", info.worker_id, info.role.value, info.pool, connection.address)
        self.connections[info.worker_id] = connection
        self.fleet.add(info)
        self._wake_waiting()
        self.on_fleet_change()

    def on_load(self, worker_id: str, load: worker_pb2.WorkerLoad) -> None:
        is_first = worker_id not in self.loads
        self.loads[worker_id] = load
        self.fleet.report(worker_id, load_report(load))
        if is_first and load.num_adapter_slots:  # not in its hello: who has an adapter may go there from now on
            self._wake_waiting()

    def on_retired(self, worker_id: str) -> None:
        self.fleet.retire(worker_id, True)
        self.on_fleet_change()

    def on_blocks(self, worker_id: str, event: BlockEvent) -> bool:
        was_known, is_snapshot = self.fleet.num_reported_blocks(worker_id) is not None, isinstance(event, SnapshotPart)
        fits = self.fleet.apply_block_event(worker_id, event)
        if not fits or (was_known and is_snapshot):  # unasked: this router was too slow
            self.observer.block_gap()
        if fits and is_snapshot and self.fleet.num_reported_blocks(worker_id) is not None:
            self.observer.block_snapshot()
        return fits

    def on_blocks_lost(self, worker_id: str) -> None:
        self.fleet.lose_blocks(worker_id)

    def on_down(self, connection: WorkerConnection, why: str) -> None:
        log.log(logging.INFO if why == CLOSED else logging.WARNING, "worker %s is down: %s", connection.worker_id, why)
        self.connections.pop(connection.worker_id, None)
        self.loads.pop(connection.worker_id, None)
        self.fleet.remove(connection.worker_id)
        self.on_fleet_change()
