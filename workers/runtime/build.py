"""What a rank is made of: its runner, and on rank 0 its engine. Knows nothing of servers or leases."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from costs.transfer import ALWAYS_FETCH, TransferCost
from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from kvstore.names import fingerprint
from workers.config import EngineConfig
from workers.engine.adapters.ref import AdapterLimits
from workers.engine.engine import Engine
from workers.engine.scheduler import Scheduler, SchedulerConfig
from workers.engine.speculation import Speculation
from workers.engine.step import Executor
from workers.kv.schemes.named import scheme_of
from workers.model.config import ModelConfig, described
from workers.parallel import ParallelGroups
from workers.runtime.coordination.executor import GroupExecutor
from workers.runtime.coordination.progress import StepProgress
from workers.runtime.fake.runner import FakeModelRunner
from workers.runtime.runner import TorchModelRunner, pick_dtype, schedules_async

LoadedRunner = TorchModelRunner | FakeModelRunner


def kv_fingerprint(engine: EngineConfig, model: ModelConfig, dtype: torch.dtype, weights: str) -> bytes:
    """Fingerprint of all that the bytes of a KV block depend on: the weights, and the model's configuration.

    In batch-invariant mode also how they were summed: a block from a worker that sums otherwise has other bits. And
    what they lose on their way, or in the cache: a block that travelled or was kept in 8 bits is another block.
    """
    summed = {"tp": engine.tp, "num_threads": engine.num_threads} if engine.batch_invariant else {}
    return fingerprint(
        {
            **summed,
            **({} if engine.kv_encoding == "none" else {"kv_encoding": engine.kv_encoding}),
            **({} if engine.kv_cache_dtype == "auto" else {"kv_scheme": described(scheme_of(engine))}),
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
    speculation: Speculation | None = None,
) -> Engine:
    """An engine over a loaded runner; on rank 0 only.

    kv_names: from kv_fingerprint. transfer_cost: of its KV tiers, where there are any. speculation: from
    workers.runtime.drafting.build, where there is some.
    """
    context_tokens = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    groups = runner.cache.layout.groups
    pools = [BlockPool(count, config.block_size, config.enable_prefix_caching) for count in runner.cache.num_blocks]
    windows, limits = ([group.spec.window for group in groups], [group.limit(config.block_size) for group in groups])
    block_pools = BlockPools(pools, windows, limits)
    context_tokens = min(context_tokens, block_pools.max_blocks * config.block_size)
    scheduler = Scheduler(
        SchedulerConfig(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            context_tokens,
            writes_back=transfer_cost is not None,
            transfer_cost=transfer_cost or ALWAYS_FETCH,
            num_stages=config.pp,
            scheduling=config.scheduler,
            adapters=AdapterLimits(config.max_loras, config.num_cpu_loras) if config.enable_lora else AdapterLimits(),
        ),
        block_pools,
        kv_names,
        frozenset(model.eos_token_ids),
    )
    is_async = schedules_async(config, runner.cache.device)
    timeout_s = config.lora_load_timeout_s
    return Engine(scheduler, executor, model.vocab_size, clock, is_async, runner.grammars, timeout_s, speculation)


def make_executor(
    config: EngineConfig, runner: LoadedRunner, groups: ParallelGroups, progress: StepProgress | None = None
) -> GroupExecutor:
    """What brings an engine's plans to all ranks."""
    device = runner.cache.device
    has_own_thread = (schedules_async(config, device) or config.pp > 1) and device.type == "cpu"
    return GroupExecutor(runner, groups, config.num_threads if has_own_thread else None, progress)


def load_runner(
    config: EngineConfig,
    model: ModelConfig,
    groups: ParallelGroups,
    device: torch.device,
    feature_layers: Sequence[int] = (),
) -> LoadedRunner:
    """The runner that the config asks for, its weights loaded. feature_layers: of workers.runtime.drafting.build.
    Raises ModelError."""
    if config.runner == "fake":
        return FakeModelRunner(config, model, pick_dtype(config, device))
    return TorchModelRunner(config, model, groups, device, feature_layers=feature_layers)
