"""One rank of a worker: its shard, and on rank 0 the engine and its gRPC server.

A plain object, so that a process, a test or a Ray actor can own it. Knows nothing of who started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import grpc
import torch
from switchyard.v1 import generation_pb2, worker_pb2, worker_pb2_grpc

from checkpoint.errors import CheckpointError
from checkpoint.identity import ServedModel, tokenizer_digest
from costs.transfer import ALWAYS_FETCH, NEVER_FETCH, TransferCost
from kvstore.addresses import join_host_port
from kvstore.block_pool import BlockPool
from kvstore.block_pools import BlockPools
from kvstore.connect import open_directory, open_tiers, place_of, reaches
from kvstore.directory import Directory, DirectoryUnavailable, WorkerRecord
from kvstore.host_tier import HostTier
from kvstore.names import fingerprint
from kvstore.prefetch import Prefetcher, PrefetchStats
from kvstore.store import FragmentStore
from kvstore.tiers import Tier
from workers.calibration import calibrate
from workers.config import EngineConfig, WorkerSpec
from workers.engine import Engine
from workers.errors import ModelError
from workers.executor import GroupExecutor, follow
from workers.fake_runner import FakeModelRunner
from workers.kv.connector import KVConnector
from workers.kv.grid import FragmentGrid
from workers.lease import Lease
from workers.loop import EngineLoop, LoopEvents, TransfersEnded
from workers.model.config import ModelConfig
from workers.model.registry import load_config
from workers.model.tensor_layout import check_split
from workers.parallel import ParallelGroups, Shard
from workers.prefetch import QueuePrefetch
from workers.runner import TorchModelRunner, pick_device, pick_dtype, schedules_async
from workers.scheduler import Scheduler, SchedulerConfig
from workers.server import MAX_MESSAGE_BYTES, WorkerServicer
from workers.step import Executor
from workers.weights import weights_identity

log = logging.getLogger(__name__)

LEASE_TTL_S = 3.0
LEASE_RENEWAL_S = 0.75
LEASE_PULSE_S = 0.25
_WIRE_ROLES = {
    "mixed": worker_pb2.WORKER_ROLE_MIXED,
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
}

LoadedRunner = TorchModelRunner | FakeModelRunner


def kv_fingerprint(engine: EngineConfig, model: ModelConfig, dtype: torch.dtype, weights: str) -> bytes:
    """Names what the bytes of a KV block mean: the weights, and everything that the model's files say of their use.

    In batch-invariant mode also how they were summed: a block from a worker that sums otherwise has other bits. And
    what they lose on their way: a block that travelled in 8 bits is another block.
    """
    summed = {"tp": engine.tp, "num_threads": engine.num_threads} if engine.batch_invariant else {}
    return fingerprint(
        {
            **summed,
            **({} if engine.kv_encoding == "none" else {"kv_encoding": engine.kv_encoding}),
            "weights": weights,
            "dtype": str(dtype),
            "block_size": engine.block_size,
            "model": model.fingerprint_fields(),
        }
    )


def make_engine(
    config: EngineConfig,
    model: ModelConfig,
    runner: LoadedRunner,
    executor: Executor,
    kv_names: bytes,
    clock: Callable[[], float] = time.monotonic,
    transfer_cost: TransferCost | None = None,
) -> Engine:
    """An engine over a loaded runner; on rank 0 only.

    kv_names: from kv_fingerprint. transfer_cost: of its KV tiers, where there are any.
    """
    context_tokens = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    windows = [group.spec.window for group in runner.cache.layout.groups]
    for num_blocks, window in zip(runner.cache.num_blocks, windows, strict=True):
        if not window:
            context_tokens = min(context_tokens, num_blocks * config.block_size)
    pools = [BlockPool(count, config.block_size, config.enable_prefix_caching) for count in runner.cache.num_blocks]
    scheduler = Scheduler(
        SchedulerConfig(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            context_tokens,
            writes_back=transfer_cost is not None,
            transfer_cost=transfer_cost or ALWAYS_FETCH,
        ),
        BlockPools(pools, windows),
        kv_names,
        frozenset(model.eos_token_ids),
    )
    return Engine(scheduler, executor, model.vocab_size, clock, schedules_async(config, runner.cache.device))


def make_executor(config: EngineConfig, runner: LoadedRunner, groups: ParallelGroups) -> GroupExecutor:
    """What brings an engine's plans to all ranks."""
    device = runner.cache.device
    return GroupExecutor(runner, groups, in_thread=schedules_async(config, device) and device.type == "cpu")


def load_runner(config: EngineConfig, model: ModelConfig, groups: ParallelGroups, device: torch.device) -> LoadedRunner:
    """The runner that the config asks for, its weights loaded. Raises ModelError."""
    if config.runner == "fake":
        return FakeModelRunner(config, model, pick_dtype(config, device))
    return TorchModelRunner(config, model, groups, device)


class Rank:
    """A shard. Call `connect` on all ranks of a worker at once, then `serve` on all of them."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        self.spec = spec
        self.shard = Shard.of_rank(rank, spec.engine.tp, spec.engine.pp)
        self.failure: Future[BaseException] = Future()  # set when the shard can no longer serve
        self._model = load_config(spec.engine.model_dir, spec.engine.ignore_keys, spec.engine.plugins)
        check_split(self._model, spec.engine.tp, spec.engine.pp)
        self._ttft_s: deque[float] = deque(maxlen=4096)  # filled by the engine, drained by metrics
        self._stopping = threading.Event()
        self._retired = threading.Event()
        self._lease = Lease(LEASE_TTL_S, time.monotonic)
        self._lease_thread: threading.Thread | None = None
        self._servicer: WorkerServicer | None = None
        self._loop: EngineLoop | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._directory: Directory | None = None
        self._tiers: list[Tier] = []
        self._store = FragmentStore(())
        self._connector: KVConnector | None = None
        self._prefetcher: Prefetcher | None = None

    # ---------------------------------------------------------------------------------------------------------- start
    def connect(self, init_method: str = "", interface: str = "") -> None:
        """Join the other ranks, load the shard's weights, open the KV tiers."""
        engine = self.spec.engine
        torch.set_num_threads(engine.num_threads)
        device = torch.device("cpu") if engine.runner == "fake" else pick_device(engine, self.shard.tp_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._groups = ParallelGroups.connect(self.shard, device, init_method, interface)
        spec = self.spec
        self._served = self._identify()
        self._runner = load_runner(engine, self._model, self._groups, device)
        if self._identify() != self._served:
            raise ModelError(f"{engine.model_dir}: changed while it was loaded")
        dtype = pick_dtype(engine, self._runner.cache.device)
        self._kv_names = kv_fingerprint(engine, self._model, dtype, self._served.weights)
        self._tiers = open_tiers(spec.host_address, spec.kvstore, spec.tier_secret, spec.control, spec.cluster)
        self._store = FragmentStore(self._tiers)
        cache, per_fragment = self._runner.cache, self.spec.layers_per_fragment
        memories = cache.memories(per_fragment, engine.kv_encoding)
        self._connector = KVConnector(memories, cache.grids(per_fragment), self._store)
        self._runner.attach(self._connector)
        self._runner.warm_up()
        self._transfer_cost: TransferCost | None = None
        if self._tiers:
            self._transfer_cost = self._measure_transfer_cost()
            log.info("%s: prefixes are fetched by %s", self.spec.worker_id, self._transfer_cost)

    def _identify(self) -> ServedModel:
        """What the files say now."""
        spec, directory = self.spec, Path(self.spec.engine.model_dir)
        weights = weights_identity(directory, self._model, spec.engine.runner)
        try:
            tokenizer = tokenizer_digest(directory)
        except CheckpointError as error:
            raise ModelError(str(error)) from None
        return ServedModel(spec.cluster, spec.model_name, weights, tokenizer)

    def _measure_transfer_cost(self) -> TransferCost:
        if self.spec.kvstore.prefix_fetch == "always":
            return ALWAYS_FETCH
        if self.spec.kvstore.prefix_fetch == "never":
            return NEVER_FETCH
        engine = self.spec.engine
        measured = calibrate(
            self._runner,
            self._kv_names,
            engine.block_size,
            self._runner.cache.num_blocks,
            engine.max_num_batched_tokens,
        )
        return measured or ALWAYS_FETCH  # no tier answers yet: whatever one has later is worth a try

    def serve(self) -> str:
        """Rank 0: start the engine and its server, register, and return HOST:PORT. Others: follow; returns ""."""
        if self.shard.rank != 0:
            threading.Thread(target=self._follow, name="follow", daemon=True).start()
            return ""
        if self.spec.control:
            self._directory = open_directory(self.spec.control, self.spec.cluster)
        engine = make_engine(
            self.spec.engine,
            self._model,
            self._runner,
            make_executor(self.spec.engine, self._runner, self._groups),
            self._kv_names,
            transfer_cost=self._transfer_cost,
        )
        started: Future[str] = Future()
        threading.Thread(target=self._serve_asyncio, args=(engine, started), name="grpc", daemon=True).start()
        address = started.result()
        if self._directory is not None:
            self._keep_alive_once(address)
            self._lease_thread = threading.Thread(target=self._keep_alive, args=(address,), name="lease", daemon=True)
            self._lease_thread.start()
        return address

    def _follow(self) -> None:
        try:
            follow(self._runner, self._groups)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._stopping.is_set() and not self.failure.done():
            log.error("rank %d of %s failed", self.shard.rank, self.spec.worker_id, exc_info=error)
            self.failure.set_result(error)

    # --------------------------------------------------------------------------------------------------------- rank 0
    def _serve_asyncio(self, engine: Engine, started: Future[str]) -> None:
        try:
            asyncio.run(self._serve_grpc(engine, started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            self._fail(error)

    async def _serve_grpc(self, engine: Engine, started: Future[str]) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        servicer = WorkerServicer(self._hello(engine), self.wire_load, time.monotonic)
        loop = EngineLoop(
            engine,
            self._directory,
            self._places,
            self._reaches,
            self._deliver_to(servicer),
            self._fail,
            time.monotonic,
            self._prefetch_for_queue(),
        )
        servicer.attach(loop)
        self._servicer = servicer
        self._loop = loop
        assert self._connector is not None, "connect() comes first"
        self._connector.on_ended = lambda: loop.post(TransfersEnded())
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                # A router whose host vanished says nothing: without these its requests would stay until TCP gives up.
                ("grpc.keepalive_time_ms", 10_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.ping_timeout_ms", 5_000),  # without it a minute, whatever keepalive says
            ]
        )
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port(join_host_port(self.spec.listen_host, 0))
        await server.start()
        loop.start()
        started.set_result(join_host_port(self.spec.listen_host, port))
        pulse = asyncio.create_task(self._pulse(), name="pulse")
        await self._closed.wait()
        pulse.cancel()
        await server.stop(grace=0.5)

    def _prefetch_for_queue(self) -> QueuePrefetch | None:
        """For the ranks of this host all at once: the fragments of all heads and layers go into its arena.

        Without a slower tier, too: the host's node may have a disk behind its arena, of which nothing is known here.
        """
        host = next((tier for tier in self._tiers if isinstance(tier, HostTier)), None)
        if host is None:
            return None
        slower = [tier for tier in self._tiers if tier is not host]
        self._prefetcher = Prefetcher(host, slower, self._all_keys)
        return QueuePrefetch(self._prefetcher)

    def _all_keys(self, block_name: bytes) -> list[bytes]:
        """Keys of a block's fragments on all ranks of the worker."""
        cache = self._runner.cache
        keys: list[bytes] = []
        for group, own in zip(cache.layout.groups, cache.grids(self.spec.layers_per_fragment), strict=True):
            whole = FragmentGrid(group.layers, own.layers_per_fragment, 0, group.spec.num_kv_heads)
            keys += whole.keys(block_name)
        return keys

    def _deliver_to(self, servicer: WorkerServicer) -> Callable[[LoopEvents], None]:
        def deliver(events: LoopEvents) -> None:
            self._ttft_s.extend(end.ttft_s for end in events.step.ended if end.ttft_s is not None)
            servicer.deliver(events)

        return deliver

    def _hello(self, engine: Engine) -> worker_pb2.WorkerHello:
        spec, scheduler = self.spec, engine.scheduler
        return worker_pb2.WorkerHello(
            worker_id=spec.worker_id,
            role=_WIRE_ROLES[spec.role],
            model=generation_pb2.ModelInfo(
                name=spec.model_name,
                context_tokens=scheduler.config.max_model_len,
                vocab_size=self._model.vocab_size,
            ),
            num_blocks=self._runner.cache.num_blocks[0],
            block_size=spec.engine.block_size,
            kv_fingerprint=self._kv_names,
            tensor_parallel_size=spec.engine.tp,
            pipeline_parallel_size=spec.engine.pp,
            served=self._served.message(),
        )

    def _places(self) -> Sequence[str]:
        """Where what this worker publishes is now, as the directory names places."""
        return [place for tier in self._tiers if tier.is_up for place in place_of(tier, self.spec.node_id)]

    def _reaches(self, places: frozenset[str]) -> bool:
        """Whether a block that is in these places can be pulled by this worker now."""
        return any(tier.is_up and reaches(tier, self.spec.node_id, places) for tier in self._tiers)

    def _keep_alive_once(self, address: str) -> None:
        assert self._directory is not None
        record = WorkerRecord(self.spec.worker_id, address, self.spec.pool, self.spec.role, self.spec.node_id)
        try:
            before = self._lease.epoch
            is_new = self._lease.renew(self._directory, record)
        except DirectoryUnavailable as error:
            log.warning("control is away: %s", error)
            return
        epoch = self._lease.epoch
        if is_new:
            log.warning("this worker stopped for longer than its lease: epoch %d follows %d", epoch, before)
        assert self._servicer is not None, "the server is there before the lease"
        assert self._asyncio is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
            self._asyncio.call_soon_threadsafe(self._servicer.lease, epoch, is_new)

    async def _pulse(self) -> None:
        while True:
            self._lease.pulse()
            await asyncio.sleep(LEASE_PULSE_S)

    def _keep_alive(self, address: str) -> None:
        while not self._retired.wait(LEASE_RENEWAL_S):
            try:
                self._keep_alive_once(address)
            except Exception:  # a worker whose lease nobody renews is lost to the cluster
                log.exception("the lease was not renewed")

    # -------------------------------------------------------------------------------------------------------- reports
    def wire_load(self) -> worker_pb2.WorkerLoad:
        """Load and counters (rank 0); fragments and bytes are this rank's own."""
        stats = self._store.stats()
        rejected = dict(stats.rejected)
        ahead = self._prefetcher.stats() if self._prefetcher is not None else PrefetchStats({}, {}, 0, {})
        for reason, count in ahead.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
        snapshot = {} if self._loop is None else asdict(self._loop.load)
        return worker_pb2.WorkerLoad(
            **snapshot,
            num_rejected_fragments=rejected,
            pulled_bytes=dict(stats.pulled_bytes),
            published_bytes=dict(stats.published_bytes),
            tier_is_up=dict(stats.tier_is_up),
            tier_problems=dict(stats.tier_problems),
            num_prefetched_fragments=dict(ahead.num_fragments),
            prefetched_bytes=dict(ahead.num_bytes),
            num_useless_prefetched_fragments=ahead.num_useless,
        )

    def metrics(self) -> dict[str, float | list[float]]:
        """Scalars of the load, "step_age_s", and under "ttft_s" the times to first token (s) since the last call."""
        ttft_s = [self._ttft_s.popleft() for _ in range(len(self._ttft_s))]
        if self._loop is None:
            return {"ttft_s": ttft_s}
        return {**asdict(self._loop.load), "step_age_s": self._loop.step_age_s, "ttft_s": ttft_s}

    def retire(self) -> None:
        """Take no new work: leave the directory while the requests that are here run on."""
        self._retired.set()
        if self._lease_thread is not None:
            self._lease_thread.join()
        if self._directory is not None:
            try:
                self._directory.withdraw(self.spec.worker_id)
            except DirectoryUnavailable as error:
                log.warning("control is away: %s", error)

    def stop(self) -> None:
        """Leave the directory, let the other ranks go, close."""
        self._stopping.set()
        self.retire()
        if self._loop is not None:
            self._loop.stop()
            self._loop.close()
        if self._connector is not None:
            self._connector.close()
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._store.close()
        if self._asyncio is not None:
            self._asyncio.call_soon_threadsafe(self._closed.set)
        self._groups.close()
