"""Derives from the configuration and the model's sizes the spec of each process of the cluster.

Pure: knows nothing of Ray, processes or files. The numbers here are handed on, never written back into the config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.config import ClusterConfig, PoolConfig
from deploy.errors import ConfigError
from kvstore.config import KV_MIXED_PRECISIONS, MIXED_PRECISION_BLOCK_TOKENS, KVStoreConfig
from kvstore.tiers.disk.disk import least_disk_bytes
from kvstore.tiers.host.arena import num_slots_for
from router.adapters.config import AdaptersConfig
from workers.config import EngineConfig, WorkerSpec, kv_row_bytes
from workers.errors import ModelError
from workers.kv.schemes.named import KVCacheOptions
from workers.model.cache_spec import CacheGroup, CacheSpec, cache_groups
from workers.model.config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
REPLICA_CPUS = 0.1  # the replica only watches over its ranks
_CPU_BLOCK_TOKENS, _CUDA_BLOCK_TOKENS = 16, 64
StageLayers = Callable[[int, int, int], range]  # (num_layers, pp, stage)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool: what Ray reserves for each worker, and each worker's spec."""

    spec: WorkerSpec
    """As far as it is known before a worker is placed: the worker fills in its id, host and addresses."""
    replicas: int
    bundles: tuple[dict[str, float], ...]
    """Resources of one worker: the replica's, then one bundle per pipeline stage with all its ranks."""
    cpus_per_rank: float
    gpus_per_rank: float
    drain_timeout_s: float
    progress_timeout_s: float

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.spec.pool

    @property
    def num_ranks(self) -> int:
        """Ranks of one worker."""
        return self.spec.engine.tp * self.spec.engine.pp

    def bundle_of(self, rank: int) -> int:
        """Index of the bundle that a rank lives in: that of its stage."""
        return 1 + rank // self.spec.engine.tp


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """Shape of each host's shared-memory arena."""

    folder: str
    slot_bytes: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What is to be started."""

    cluster: str
    model_name: str
    pools: tuple[PoolPlan, ...]
    arena: ArenaPlan


def make_plan(
    config: ClusterConfig,
    model: ModelConfig,
    model_dir: str,
    num_gpus: float,
    control: str,
    tier_secret: str = "",
    cluster: str = "",
    cpu_dtype: str = "float32",
    draft_dir: str = "",
) -> ClusterPlan:
    """Work out the whole cluster.

    model_dir: an absolute path, the name of a packaged model, or a Hub id. num_gpus: what Ray has to offer. control:
    URL of the control service. tier_secret: of the remote tier, where there is one. cluster: its name. cpu_dtype: what
    model.dtype=auto means on CPUs. draft_dir: of the draft model, where there is one, as model_dir.
    Raises ConfigError where parts of the configuration do not fit each other or the machines.
    """
    devices = {name: _device(config, pool, num_gpus) for name, pool in config.pools.items()}
    dtype = _dtype(config, set(devices.values()), cpu_dtype)
    _check_invariance(config, devices)
    block_size = _block_size(config.kvstore, "cuda" in devices.values())
    layers = layers_per_fragment(config, model.cache_specs)
    name = model_name(config, model_dir)
    pools = []
    for pool_name, pool in config.pools.items():
        spec = WorkerSpec(
            worker_id="",
            pool=pool_name,
            role=pool.role,
            engine=dataclasses.replace(
                _engine(config, pool, model_dir, devices[pool_name], dtype, block_size),
                speculative=dataclasses.replace(config.speculative, model=draft_dir),
            ),
            model_name=name,
            kvstore=config.kvstore,
            tier_secret=tier_secret,
            control=control,
            layers_per_fragment=layers,
            cluster=cluster,
        )
        pools.append(_pool_plan(spec, pool))
    arena = _arena(config.kvstore, layers * _fragment_layer_bytes(config, model, block_size, dtype))
    return ClusterPlan(cluster, name, tuple(pools), arena)


def _block_size(store: KVStoreConfig, on_cuda: bool) -> int:
    on_cpu = MIXED_PRECISION_BLOCK_TOKENS if store.kv_cache_dtype in KV_MIXED_PRECISIONS else _CPU_BLOCK_TOKENS
    return store.block_size or (_CUDA_BLOCK_TOKENS if on_cuda else on_cpu)


def _fragment_layer_bytes(config: ClusterConfig, model: ModelConfig, block_size: int, dtype: str) -> int:
    """Of a fragment, for each layer in it; the largest of all cache groups."""
    encoding = config.kvstore.kv_encoding
    if encoding == "none":
        return max(group.block_bytes(block_size, dtype) for group in _cache_groups(config.kvstore, model, block_size))
    return max(
        spec.num_planes * block_size * kv_row_bytes(encoding, spec.head_dim, DTYPE_BYTES[dtype])
        for spec in model.cache_specs
    )


def _cache_groups(store: KVStoreConfig, model: ModelConfig, block_size: int) -> tuple[CacheGroup, ...]:
    options = KVCacheOptions(store.kv_cache_dtype, store.kv_window_tokens, store.kv_sink_tokens)
    try:
        return options.scheme(block_size).groups(model.cache_specs)
    except ModelError as error:
        raise ConfigError(f"kvstore.{error}") from None


def _arena(store: KVStoreConfig, slot_bytes: int) -> ArenaPlan:
    least_bytes = least_disk_bytes(slot_bytes)
    if 0 < store.disk_bytes < least_bytes:
        raise ConfigError(
            f"kvstore.disk_bytes: must be at least {least_bytes} for fragments of {slot_bytes} bytes, "
            f"not {store.disk_bytes}"
        )
    return ArenaPlan(store.arena_dir, slot_bytes, num_slots_for(store.host_bytes, slot_bytes))


def model_name(config: ClusterConfig, model_dir: str) -> str:
    """What clients call the model: the configured name, or that of the directory or file, or the Hub id."""
    is_path = model_dir.startswith("/")
    last = model_dir.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    return config.model.name or (last if is_path else model_dir)


def cluster_name(config: ClusterConfig, model_dir: str, host: str, start_id: str) -> str:
    """The configured name, or one derived from where the cluster runs: the same at its next start there.

    host: what tells this machine from others, and differs in each new container. start_id: of this start; counts where
    any free port is taken.
    """
    if config.name:
        return config.name
    port = config.endpoints.grpc_port
    where = f"{host}\0{config.endpoints.grpc_host}:{port or start_id}\0{model_name(config, model_dir)}"
    return "sy-" + hashlib.blake2b(where.encode(), digest_size=8).hexdigest()


def _engine(
    config: ClusterConfig, pool: PoolConfig, model_dir: str, device: str, dtype: str, block_size: int
) -> EngineConfig:
    return EngineConfig(
        model_dir,
        dtype,
        device,
        block_size=block_size,
        max_model_len=config.model.max_model_len,
        batch_invariant=config.model.batch_invariant,
        kv_encoding=config.kvstore.kv_encoding,
        kv_cache_dtype=config.kvstore.kv_cache_dtype,
        kv_window_tokens=config.kvstore.kv_window_tokens,
        kv_sink_tokens=config.kvstore.kv_sink_tokens,
        ignore_keys=config.model.ignore_keys,
        plugins=config.model.plugins,
        **dataclasses.asdict(config.engine),
        **pool.options(),
        **_adapter_options(config.adapters),
    )


def _adapter_options(adapters: AdaptersConfig) -> dict[str, Any]:
    """Fields of EngineConfig that are the same in all pools."""
    return {
        "enable_lora": adapters.enabled,
        "max_loras": adapters.max_loras,
        "max_lora_rank": adapters.max_lora_rank,
        "max_cpu_loras": adapters.max_cpu_loras,
        "lora_load_timeout_s": adapters.load_timeout_s,
    }


def _pool_plan(spec: WorkerSpec, pool: PoolConfig) -> PoolPlan:
    on_gpu = spec.engine.device == "cuda"
    return PoolPlan(
        spec=spec,
        replicas=pool.replicas,
        bundles=bundles(pool, on_gpu),
        cpus_per_rank=pool.cpus_per_rank,
        gpus_per_rank=pool.gpus_per_rank if on_gpu else 0.0,
        drain_timeout_s=pool.drain_timeout_s,
        progress_timeout_s=pool.progress_timeout_s,
    )


def takes_cpu_dtype(config: ClusterConfig, num_gpus: float) -> bool:
    """Whether it depends on the processor what model.dtype=auto means."""
    is_open = config.model.dtype == "auto" and config.engine.runner != "fake" and not config.model.batch_invariant
    return is_open and all(_device(config, pool, num_gpus) == "cpu" for pool in config.pools.values())


def bundles(pool: PoolConfig, on_gpu: bool) -> tuple[dict[str, float], ...]:
    """What Ray reserves for a worker: for the replica itself, then for each pipeline stage with all its ranks."""
    stage = {"CPU": pool.tp * pool.cpus_per_rank, "GPU": pool.tp * pool.gpus_per_rank if on_gpu else 0.0}
    wanted = [{"CPU": REPLICA_CPUS}, *[stage] * pool.pp]
    return tuple({k: v for k, v in {**bundle, **pool.resources}.items() if v} for bundle in wanted)


def num_cpus_needed(config: ClusterConfig) -> int:
    """CPUs that all pools reserve together."""
    return math.ceil(sum(p.replicas * (REPLICA_CPUS + p.tp * p.pp * p.cpus_per_rank) for p in config.pools.values()))


def check_cpu_memory(config: ClusterConfig, model: ModelConfig, memory_bytes: int, has_gpus: bool) -> None:
    """See that a machine's memory has space for what is asked of workers that are sure to run on its CPUs.

    What a GPU has space for is known to the worker that finds it. Raises ConfigError.
    """
    pools = {name: pool for name, pool in config.pools.items() if _device(config, pool, float(has_gpus)) == "cpu"}
    block_size = _block_size(config.kvstore, on_cuda=False)
    dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
    block_bytes = sum(
        len(group.layers) * group.spec.num_kv_heads * group.block_bytes(block_size, dtype)
        for group in _cache_groups(config.kvstore, model, block_size)
    )
    if pools and block_bytes > memory_bytes:
        raise ConfigError(f"kvstore.block_size: one block takes {block_bytes} bytes, more than this machine's memory")
    for name, pool in pools.items():
        if pool.num_blocks * block_bytes > memory_bytes:
            blocks = f"{pool.num_blocks} blocks of {block_bytes} bytes"
            raise ConfigError(f"pools.{name}.num_blocks: {blocks} are more than this machine's memory ({memory_bytes})")
    longest = model.max_position_embeddings
    table_bytes = 4 * longest * max(spec.head_dim for spec in model.cache_specs)  # of positions, see layers.rope
    if pools and table_bytes > memory_bytes:
        table = f"a table of {table_bytes} bytes, more than this machine's memory ({memory_bytes})"
        raise ConfigError(f"config.json: max_position_embeddings={longest} takes {table}")


def _device(config: ClusterConfig, pool: PoolConfig, num_gpus: float) -> str:
    if config.engine.runner == "fake":
        return "cpu"
    if pool.device != "auto":
        return pool.device
    return "cuda" if num_gpus else "cpu"


def _dtype(config: ClusterConfig, devices: set[str], cpu_dtype: str) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    if len(devices) > 1:
        # A block of one dtype is never used for the other, so nothing would move from pool to pool.
        raise ConfigError("model.dtype: must be set when some pools run on cpu and some on cuda")
    return "bfloat16" if devices == {"cuda"} else cpu_dtype


def _check_invariance(config: ClusterConfig, devices: Mapping[str, str]) -> None:
    """A sum over other ranks, threads or devices has other bits, and blocks travel from pool to pool."""
    kinds = {(pool.tp, pool.num_threads, devices[name]) for name, pool in config.pools.items()}
    if config.model.batch_invariant and len(kinds) > 1:
        raise ConfigError("model.batch_invariant: all pools must have the same tp, num_threads and device")


# ---- layers that travel together


def layers_per_fragment(config: ClusterConfig, cache_specs: Sequence[CacheSpec]) -> int:
    """The configured number, checked, or the greatest that every stage boundary of every pool is a multiple of.

    Boundaries are counted in the layers of each cache group, because a fragment has layers of one group. A stage then
    owns whole fragments, whatever the pipelines of the worker that wrote a block and of the one that reads it. Raises
    ConfigError.
    """
    num_layers = len(cache_specs)
    depths = {pool.pp for pool in config.pools.values()}
    wanted = config.kvstore.layers_per_fragment
    if depths == {1}:
        boundaries = {num_layers}
    else:
        from workers.parallel import stage_layers  # brings torch: two seconds that a cluster without stages saves

        boundaries = stage_boundaries(depths, num_layers, stage_layers)
    groups = cache_groups(cache_specs)
    greatest = math.gcd(*(sum(layer < edge for layer in group.layers) for edge in boundaries for group in groups))
    if wanted and greatest % wanted:
        raise ConfigError(
            f"kvstore.layers_per_fragment: {wanted} does not divide the stages of the pools, which begin and end at "
            f"layers {', '.join(str(b) for b in sorted(boundaries))}; {greatest} is the greatest that does"
        )
    return wanted or greatest


def stage_boundaries(depths: Iterable[int], num_layers: int, stage_layers: StageLayers) -> set[int]:
    """Where a stage of any of the pipelines begins or ends, 0 left out."""
    stages = [stage_layers(num_layers, pp, stage) for pp in depths for stage in range(pp)]
    return {edge for layers in stages for edge in (layers.start, layers.stop)} - {0}
