"""One rank of a worker: its shard of the model, joined with the others; on rank 0 the worker's leader beside it.

A plain object, so that a process, a test or a Ray actor can own it. Knows nothing of who started it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from checkpoint.errors import CheckpointError
from checkpoint.identity import ServedModel, tokenizer_digest
from costs.transfer import ALWAYS_FETCH, NEVER_FETCH, TransferCost
from kvstore.connect import open_tiers
from kvstore.store import FragmentStore
from kvstore.tiers.tier import Tier
from workers.config import WorkerSpec
from workers.errors import ModelError
from workers.kv.calibration import calibrate
from workers.kv.connector import KVConnector
from workers.kv.grid import FragmentGrid
from workers.model.identity import weights_identity
from workers.model.registry import load_config
from workers.model.tensor_layout import check_split
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import kv_fingerprint, load_runner, make_engine, make_executor
from workers.runtime.coordination.executor import follow
from workers.runtime.coordination.watch import RankWatch, WatchLimits
from workers.runtime.cpu_settings import prepare_cpu
from workers.runtime.drafting.build import feature_layers, load_draft, make_speculator, measure_costs
from workers.runtime.leader import WorkerFacts, WorkerLeader
from workers.runtime.runner import pick_device, pick_dtype
from workers.speculation.step_costs import StepCosts

log = logging.getLogger(__name__)


class Rank:
    """A shard. Call `connect` on all ranks of a worker at once, then `serve` on all of them."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        self.spec = spec
        self.shard = Shard.of_rank(rank, spec.engine.tp, spec.engine.pp)
        self.failure: Future[BaseException] = Future()  # set when the shard can no longer serve
        self._model = load_config(spec.engine.model_dir, spec.engine.ignore_keys, spec.engine.plugins)
        check_split(self._model, spec.engine.tp, spec.engine.pp)
        self._stopping = threading.Event()
        self._tiers: Sequence[Tier] = ()
        self._store = FragmentStore(())
        self._connector: KVConnector | None = None
        self._leader: WorkerLeader | None = None

    # ---------------------------------------------------------------------------------------------------------- start
    def connect(self, init_method: str = "", interface: str = "") -> None:
        """Join the other ranks, load the shard's weights, open the KV tiers.

        In a thread that ends with it. OpenMP keeps a team for each thread that has computed. When all teams together
        have more threads than there are cores, they sleep between two operations instead of spinning, and the engine's
        operations wait for wake-ups, on small models longer than they compute.
        """
        with ThreadPoolExecutor(1, "load") as thread:
            thread.submit(self._connect, init_method, interface).result()

    def _connect(self, init_method: str, interface: str) -> None:
        engine = self.spec.engine
        prepare_cpu(engine.num_threads)
        device = torch.device("cpu") if engine.runner == "fake" else pick_device(engine, self.shard.tp_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._groups = ParallelGroups.connect(self.shard, device, init_method, interface)
        spec = self.spec
        limits = WatchLimits(engine.rank_silence_s, engine.rank_stall_s)
        self._watch = RankWatch(self._groups, limits, self._fail)
        self._watch.meet(self.spec.listen_host)
        self._served = self._identify()
        self._draft = load_draft(engine, device) if self.shard.rank == 0 else None
        layers = feature_layers(engine, self.shard)
        self._runner = load_runner(engine, self._model, self._groups, device, layers)
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
        self._step_costs = self._measure_steps()
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

    def _measure_steps(self) -> StepCosts | None:
        engine = self.spec.engine
        is_adaptive = engine.speculative.method != "none" and engine.speculative.enable_adaptive_verification
        if not is_adaptive or engine.runner == "fake":
            return None
        return measure_costs(engine, self._model, self._runner)

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
        self._runner.on_progress(self._watch.progress.note)
        self._watch.start()
        if self.shard.rank != 0:
            threading.Thread(target=self._follow, name="follow", daemon=True).start()
            return ""
        assert self._connector is not None, "connect() comes first"
        engine = make_engine(
            self.spec.engine,
            self._model,
            self._runner,
            make_executor(self.spec.engine, self._runner, self._groups, self._watch.progress),
            self._kv_names,
            transfer_cost=self._transfer_cost,
            speculation=make_speculator(self.spec.engine, self._runner, self._draft, self._step_costs),
        )
        facts = WorkerFacts(self._served, self._kv_names, self._model.vocab_size, self._runner.cache.num_blocks[0])
        self._leader = WorkerLeader(self.spec, facts, engine, self._tiers, self._store, self._fail)
        return self._leader.serve(self._connector, self._all_keys, self._runner.adapters)

    def _follow(self) -> None:
        try:
            follow(self._runner, self._groups, self._watch.progress)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        error = self._watch.explained(error)
        self._watch.say(error)
        if not self._stopping.is_set() and not self.failure.done():
            log.error("rank %d of %s failed", self.shard.rank, self.spec.worker_id, exc_info=error)
            self.failure.set_result(error)

    def _all_keys(self, block_name: bytes) -> list[bytes]:
        """Keys of a block's fragments on all ranks of the worker."""
        cache = self._runner.cache
        keys: list[bytes] = []
        for group, own in zip(cache.layout.groups, cache.grids(self.spec.layers_per_fragment), strict=True):
            whole = FragmentGrid(group.layers, own.layers_per_fragment, 0, group.spec.num_kv_heads, group.level)
            keys += whole.keys(block_name)
        return keys

    def metrics(self) -> dict[str, Any]:
        """As WorkerLeader.metrics; nothing on other ranks."""
        return {} if self._leader is None else self._leader.metrics()

    # ------------------------------------------------------------------------------------------------------------ end
    def retire(self) -> None:
        """Take no new work: leave the directory while the requests that are here run on."""
        if self._leader is not None:
            self._leader.retire()

    def stop(self) -> None:
        """Leave the directory, let the other ranks go, close."""
        self._stopping.set()
        self._watch.stop()
        if self._leader is not None:
            self._leader.stop_engine()
        if self._connector is not None:
            self._connector.close()
            self._runner.close()
        self._store.close()
        if self._leader is not None:
            self._leader.close()
        self._groups.close()
