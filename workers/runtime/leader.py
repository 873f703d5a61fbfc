"""Rank 0's part of a worker beside its shard: the engine, its gRPC server, and what it says of itself.

Knows nothing of who started the worker, or of how the other ranks were joined.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

import grpc
from switchyard.v1 import generation_pb2, worker_pb2, worker_pb2_grpc

from checkpoint.identity import ServedModel
from kvstore.connect import locations_of, open_directory, reaches
from kvstore.control.directory import WorkerRecord
from kvstore.control.roles import WIRE_ROLES
from kvstore.network.addresses import join_host_port
from kvstore.store import FragmentStore
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.prefetch import Prefetcher, PrefetchStats
from kvstore.tiers.tier import Tier
from workers.config import WorkerSpec
from workers.engine.engine import Engine
from workers.engine.loop import EngineLoop, LoopEvents, TransfersEnded
from workers.engine.prefetch import QueuePrefetch
from workers.kv.connector import KVConnector
from workers.runtime.rank_adapters import RankAdapters
from workers.server.registration import Registration
from workers.server.servicer import MAX_MESSAGE_BYTES, WorkerServicer

_MAX_TTFTS = 4096  # not reported yet


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker says of itself to routers, beside its spec."""

    served: ServedModel
    kv_fingerprint: bytes
    vocab_size: int
    num_blocks: int  # of the first cache group


class WorkerLeader:
    """Serves the requests of one worker. on_failure: called with the error when that is over."""

    def __init__(
        self,
        spec: WorkerSpec,
        facts: WorkerFacts,
        engine: Engine,
        tiers: Sequence[Tier],
        store: FragmentStore,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._spec = spec
        self._facts = facts
        self._engine = engine
        self._tiers = tiers
        self._store = store
        self._on_failure = on_failure
        self._ttft_s: deque[float] = deque(maxlen=_MAX_TTFTS)  # filled by the engine, drained by metrics
        self._directory = open_directory(spec.control, spec.cluster) if spec.control else None
        self._servicer: WorkerServicer | None = None
        self._registration: Registration | None = None
        self._prefetcher: Prefetcher | None = None
        self._loop: EngineLoop | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None

    def serve(
        self,
        connector: KVConnector,
        all_keys: Callable[[bytes], Sequence[bytes]],
        adapters: RankAdapters[Any] | None = None,
    ) -> str:
        """Start the engine and its server, register, and return HOST:PORT.

        connector, adapters: of this rank. all_keys: keys of a block's fragments on all ranks of the worker.
        """
        self._connector, self._adapters = connector, adapters
        started: Future[str] = Future()
        queue_prefetch = self._prefetch_for_queue(all_keys)
        Thread(target=self._serve_asyncio, args=(queue_prefetch, started), name="grpc", daemon=True).start()
        return started.result()

    def _serve_asyncio(self, queue_prefetch: QueuePrefetch | None, started: Future[str]) -> None:
        try:
            asyncio.run(self._serve_grpc(queue_prefetch, started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            self._on_failure(error)

    async def _serve_grpc(self, queue_prefetch: QueuePrefetch | None, started: Future[str]) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._servicer = servicer = WorkerServicer(self._hello(), self.wire_load, time.monotonic)
        self._loop = loop = EngineLoop(
            self._engine,
            self._directory,
            self._locations,
            self._reaches,
            self._deliver_to(servicer),
            self._on_failure,
            time.monotonic,
            queue_prefetch,
        )
        self._connector.on_ended = lambda: loop.post(TransfersEnded())
        if self._adapters is not None:
            self._adapters.on_ended = self._connector.on_ended
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                # A router whose host vanished closes nothing: without these its requests would stay until TCP gives up.
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.ping_timeout_ms", 5_000),  # without it a minute, whatever keepalive says
            ]
        )
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port(join_host_port(self._spec.listen_host, 0))
        address = join_host_port(self._spec.listen_host, port)
        spec = self._spec
        record = WorkerRecord(spec.worker_id, address, spec.pool, spec.role, spec.node_id)
        self._registration = Registration(self._directory, record, servicer)
        servicer.attach(loop, self._registration)
        await server.start()
        loop.start()
        await self._registration.announce()
        started.set_result(address)
        await self._closed.wait()
        await server.stop(grace=0.5)

    def _prefetch_for_queue(self, all_keys: Callable[[bytes], Sequence[bytes]]) -> QueuePrefetch | None:
        """For the ranks of this host all at once: the fragments of all heads and layers go into its arena.

        Without a slower tier, too: the host's node may have a disk behind its arena, of which nothing is known here.
        """
        host = next((tier for tier in self._tiers if isinstance(tier, HostTier)), None)
        if host is None:
            return None
        slower = [tier for tier in self._tiers if tier is not host]
        self._prefetcher = Prefetcher(host, slower, all_keys)
        return QueuePrefetch(self._prefetcher)

    def _deliver_to(self, servicer: WorkerServicer) -> Callable[[LoopEvents], None]:
        def deliver(events: LoopEvents) -> None:
            self._ttft_s.extend(end.ttft_s for end in events.step.ended if end.ttft_s is not None)
            servicer.deliver(events)

        return deliver

    def _hello(self) -> worker_pb2.WorkerHello:
        spec, facts = self._spec, self._facts
        return worker_pb2.WorkerHello(
            worker_id=spec.worker_id,
            role=WIRE_ROLES[spec.role],
            model=generation_pb2.ModelInfo(
                name=spec.model_name,
                context_tokens=self._engine.scheduler.config.max_model_len,
                vocab_size=facts.vocab_size,
            ),
            num_blocks=facts.num_blocks,
            block_size=spec.engine.block_size,
            kv_fingerprint=facts.kv_fingerprint,
            tensor_parallel_size=spec.engine.tp,
            pipeline_parallel_size=spec.engine.pp,
            served=facts.served.message(),
        )

    def _locations(self) -> Sequence[str]:
        """Where what this worker publishes is now, as the directory names locations."""
        return [location for tier in self._tiers if tier.is_up for location in locations_of(tier, self._spec.node_id)]

    def _reaches(self, locations: frozenset[str]) -> bool:
        """Whether a block at these locations can be pulled by this worker now."""
        return any(tier.is_up and reaches(tier, self._spec.node_id, locations) for tier in self._tiers)

    # -------------------------------------------------------------------------------------------------------- reports
    def wire_load(self) -> worker_pb2.WorkerLoad:
        """Load and counters; fragments and bytes are this rank's own."""
        stats = self._store.stats()
        rejected = dict(stats.rejected)
        prefetched = self._prefetcher.stats() if self._prefetcher is not None else PrefetchStats({}, {}, 0, {})
        for reason, count in prefetched.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
        snapshot = {} if self._loop is None else asdict(self._loop.load)
        return worker_pb2.WorkerLoad(
            **snapshot,
            **self._demand(),
            num_rejected_fragments=rejected,
            pulled_bytes=dict(stats.pulled_bytes),
            published_bytes=dict(stats.published_bytes),
            tier_is_up=dict(stats.tier_is_up),
            tier_problems=dict(stats.tier_problems),
            num_prefetched_fragments=dict(prefetched.num_fragments),
            prefetched_bytes=dict(prefetched.num_bytes),
            num_useless_prefetched_fragments=prefetched.num_useless,
        )

    def _demand(self) -> dict[str, Any]:
        return {} if self._servicer is None else asdict(self._servicer.demand)

    def metrics(self) -> dict[str, Any]:
        """Scalars of the load, "step_age_s", the "pool" and "role" of now, and under "ttft_s" the times to first token
        (s) since the last call."""
        ttft_s = [self._ttft_s.popleft() for _ in range(len(self._ttft_s))]
        now = self._registration.record if self._registration is not None else self._spec
        report = {"ttft_s": ttft_s, "pool": now.pool, "role": now.role}
        if self._loop is None:
            return report
        return {**asdict(self._loop.load), **self._demand(), "step_age_s": self._loop.step_age_s, **report}

    # ------------------------------------------------------------------------------------------------------------ end
    def retire(self) -> None:
        """Take no new work: leave the directory while the requests that are here run on."""
        if self._registration is not None:
            self._registration.withdraw()

    def stop_engine(self) -> None:
        """Finish the step in progress, and let the other ranks go."""
        self.retire()
        if self._loop is not None:
            self._loop.stop()
            self._loop.close()
        if self._prefetcher is not None:
            self._prefetcher.close()

    def close(self) -> None:
        """End the server."""
        if self._asyncio is not None:
            self._asyncio.call_soon_threadsafe(self._closed.set)
