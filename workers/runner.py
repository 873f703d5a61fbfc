"""Carries out the plan of a step on one rank: pulls blocks, runs the forward pass, chooses tokens, publishes blocks.

The only file between the scheduler and the tensors. Knows nothing of requests beyond the plan.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from workers.batching import NO_PADDING, InputBuffers, PreparedBatch
from workers.config import EngineConfig
from workers.errors import ModelError
from workers.graphs import GraphedStage
from workers.kv_transfer import FragmentGrid, KVTransfer
from workers.loader import Checkpoint, Weights
from workers.model.cache_spec import cache_groups
from workers.model.config import ModelConfig
from workers.model.stage import build_stage
from workers.model.tensor_layout import check_checkpoint
from workers.parallel import ParallelGroups
from workers.sampler import sample
from workers.step import BlockTransfer, ModelRunnerOutput, SampleSpec, ScheduledRequest, SchedulerOutput

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_CACHE_BYTES = 256 << 20  # KV cache of one worker on a CPU when the config does not say
CUDA_CACHE_SHARE = 0.95  # of the memory that is free beside weights, activations and graphs
_WARM_UP_TOKENS, _WARM_UP_SEQS = 3, 2
_CHUNKS_OF_OTHER_TILES = (2, 4, 8, 16, 32, 128)  # attention picks its tile by the longest chunk


def pick_device(config: EngineConfig, local_rank: int) -> torch.device:
    """The rank's device."""
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("device=cuda: there is no CUDA device")
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if wanted == "cuda" else torch.device(wanted)


def pick_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache: what the config says, else bf16 on CUDA and fp32 on CPU."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def schedules_async(config: EngineConfig, device: torch.device) -> bool:
    """Whether steps are planned ahead: what the config says, else on CUDA, where there is one stage."""
    if config.async_scheduling is not None:
        return config.async_scheduling
    return device.type == "cuda" and config.pp == 1


def _read_later(token_ids: Tensor | None) -> Callable[[], list[int]]:
    """The copy to the host begins now; what is returned waits for it, and for nothing that is started later."""
    if token_ids is None:
        return list
    if not token_ids.is_cuda:
        return token_ids.tolist
    host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
    host.copy_(token_ids, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        values: list[int] = host.tolist()
        return values

    return read


class TorchModelRunner:
    """One rank's weights and KV cache."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        groups: ParallelGroups,
        device: torch.device,
        weights: Weights | None = None,
    ) -> None:
        """weights: those of config.model_dir unless others are given."""
        self._config = config
        self._device = device
        self._groups = groups
        self._vocab_size = model.vocab_size
        self._dtype = pick_dtype(config, device)
        if weights is None:
            check_checkpoint(Path(config.model_dir), model)
            weights = Checkpoint(Path(config.model_dir), self._dtype, device)
        self._stage = build_stage(model, weights, groups, config.batch_invariant)
        self._context_tokens = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
        self._inputs = InputBuffers(
            max(config.max_num_batched_tokens, config.max_num_seqs, _WARM_UP_TOKENS),
            max(config.max_num_seqs, _WARM_UP_SEQS),
            -(-self._context_tokens // config.block_size),
            device,
            len(cache_groups(model.cache_specs)),
        )
        self._graphs: GraphedStage | None = None
        self.replays = True  # graphs, where there are any; a benchmark compares
        self._transfer: KVTransfer | None = None
        self._last_tokens: Tensor | None = None  # of the last step, on the device
        self._last_order: Sequence[int] = ()  # place in the plan of each of them
        spec = model.cache_specs[0]  # all layers' rows have the same shape
        self._kv_heads = spec.num_kv_heads // config.tp
        self._head_dim = spec.head_dim
        self.num_blocks = config.num_blocks or self._blocks_that_fit()
        (self.num_blocks,) = groups.min_over_ranks([self.num_blocks])
        self._make_cache(self.num_blocks)

    def _make_cache(self, num_blocks: int) -> None:
        # Zeros, not empty: attention multiplies masked slots by 0, and 0 x NaN is NaN.
        shape = (len(self._stage.layers), num_blocks, self._kv_heads, 2, self._config.block_size, self._head_dim)
        self.cache = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._layer_caches = list(self.cache.unbind(0))

    def _blocks_that_fit(self) -> int:
        slot_bytes = len(self._stage.layers) * self._kv_heads * 2 * self._head_dim * self._dtype.itemsize
        block_bytes = slot_bytes * self._config.block_size
        if self._device.type == "cuda":
            free_bytes = int(self._free_bytes_beside_steps() * CUDA_CACHE_SHARE)
        else:
            free_bytes = CPU_CACHE_BYTES // self._groups.world_size
        if free_bytes < block_bytes:
            raise ModelError(f"no memory for one KV block of {block_bytes} bytes ({free_bytes} bytes are free)")
        return free_bytes // block_bytes

    def _free_bytes_beside_steps(self) -> int:
        """What is free on the device when the largest steps have what they need: tried out, on a cache of one block."""
        before, _ = torch.cuda.mem_get_info(self._device)
        self._make_cache(1)
        self.warm_up()
        torch.cuda.synchronize(self._device)
        needed = before - torch.cuda.mem_get_info(self._device)[0]
        self._graphs = None  # they know the addresses of the small cache
        self._layer_caches, self.cache = [], torch.empty(0)
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0] - needed

    def attach(self, transfer: KVTransfer) -> None:
        """Give the rank its way to the KV tiers; without one, plans must not load or store."""
        self._transfer = transfer

    def grid(self, layers_per_fragment: int) -> FragmentGrid:
        """What this rank owns of the model's KV."""
        held = self._stage.layer_range
        group = layers_per_fragment or len(held)
        if held.start % group or len(held) % group:
            raise ModelError(
                f"layers_per_fragment={group} does not fit the stage's layers {held.start}..{held.stop - 1}"
            )
        heads = self.cache.shape[2]
        return FragmentGrid(held.start, len(held), group, self._groups.shard.tp_rank * heads, heads)

    def warm_up(self) -> None:
        """Set up what the first steps would pay for, and record the graphs. On all ranks at once.

        Its first step writes into block 0, which no request owns yet.
        """
        chunk = ScheduledRequest("", [0, 0], 0, 0, [0, 0], None)
        decode = ScheduledRequest("", [0], 0, 0, [0], SampleSpec(0.0, 1.0, 0, 0, 0))
        self.execute(SchedulerOutput([chunk, decode]))
        config = self._config
        if self._uses_graphs:
            graphs = GraphedStage(self._stage, self._layer_caches, self._inputs)
            is_leader = self._groups.shard.rank == 0
            with torch.inference_mode(), self._on_device():
                graphs.capture(config.max_num_seqs, config.max_num_batched_tokens, config.block_size, is_leader)
            self._graphs = graphs
        if self._device.type == "cuda":
            self._run_largest_steps()

    def _run_largest_steps(self) -> None:
        """Settles how much memory steps take, and compiles attention for all its tiles. Behind the graphs, for to
        record one gives back what is not in use."""
        config = self._config
        most = min(config.max_num_batched_tokens, self._context_tokens)
        for num_tokens in [n for n in _CHUNKS_OF_OTHER_TILES if n < most] + [most]:
            blocks = [0] * -(-num_tokens // config.block_size)
            self.execute(SchedulerOutput([ScheduledRequest("", [0] * num_tokens, 0, num_tokens, blocks, None)]))
        sampled = ScheduledRequest("", [0], 0, 1, [0], SampleSpec(1.0, 0.9, 0, 0, 0))
        self.execute(SchedulerOutput([sampled] * min(config.max_num_seqs, config.max_num_batched_tokens)))

    def _on_device(self) -> AbstractContextManager[object]:
        """The current device is a setting of the thread, and this may be any."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def _uses_graphs(self) -> bool:
        wanted = self._config.cuda_graphs
        return self._device.type == "cuda" if wanted is None else wanted

    # ------------------------------------------------------------------------------------------------------- one step
    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Loads, forward pass, stores, write-backs."""
        return self.start(plan)()

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """As execute, but on CUDA the forward pass may still run; what is returned waits for its tokens."""
        with torch.inference_mode(), self._on_device():
            return self._start(plan)

    def _start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        started = time.perf_counter()
        loaded = [self._load(load) for load in plan.loads]
        self._prepare(plan.stores)
        tokens: Tensor | None = None
        order: list[int] = []
        if plan.requests:
            prepared, logits = self._forward(plan.requests)
            order = prepared.order
            if logits is not None and order:
                tokens = self._choose(logits, prepared)
            tokens = self._groups.tokens_to_leader(tokens, len(order))
            self._last_tokens, self._last_order = tokens, order
        stored = [self._save(store) for store in plan.stores]
        if self._transfer is not None:
            for write_back in plan.write_backs:
                self._transfer.write_back(write_back)
        counts = self._groups.min_over_ranks([*loaded, *stored])
        read = _read_later(tokens)

        def wait() -> ModelRunnerOutput:
            token_ids = read()
            sampled = [0] * len(token_ids)
            for place, token_id in zip(order if token_ids else (), token_ids, strict=True):
                sampled[place] = token_id
            duration_s = time.perf_counter() - started
            return ModelRunnerOutput(sampled, counts[: len(loaded)], counts[len(loaded) :], duration_s)

        return wait

    def _forward(self, requests: Sequence[ScheduledRequest]) -> tuple[PreparedBatch, Tensor | None]:
        """The batch, and on the last stage the logits of its sampled rows."""
        graphs = self._graphs if self.replays else None
        padding = None if graphs is None else graphs.padding_for(requests)
        config = self._config
        prepared = self._inputs.fill(
            requests, config.block_size, config.batch_invariant, padding or NO_PADDING, self._last_order
        )
        batch, received = prepared.batch, None
        if prepared.has_pending_tokens:
            self._put_last_tokens(batch.token_ids)
        if not self._stage.is_first:
            shape = (2, len(batch.token_ids), self._stage.hidden_size)
            received = self._groups.recv_from_previous_stage(shape, self._dtype)
        if graphs is not None and padding is not None:
            out = graphs.run(prepared, received)
        else:
            out = self._stage.forward(batch, self._layer_caches, received)
        if not self._stage.is_last:
            self._groups.send_to_next_stage(out)
            return prepared, None
        return prepared, out[: len(prepared.samples)]

    def _put_last_tokens(self, token_ids: Tensor) -> None:
        """In place of -1 - i, the token that the last step chose in its row i; the host may not know it yet."""
        assert self._last_tokens is not None
        rows = (-1 - token_ids).clamp_(min=0)
        chosen = self._last_tokens[rows].clamp_(min=0)  # after NO_TOKEN nobody wants what is computed here
        token_ids.copy_(torch.where(token_ids < 0, chosen, token_ids))

    def _choose(self, logits: Tensor, prepared: PreparedBatch) -> Tensor:
        return sample(logits, prepared.samples, self._groups, self._vocab_size)

    def _load(self, load: BlockTransfer) -> int:
        return 0 if self._transfer is None else self._transfer.load(load)

    def _prepare(self, stores: Sequence[BlockTransfer]) -> None:
        if self._transfer is not None:
            for store in stores:
                self._transfer.prepare(store)

    def _save(self, store: BlockTransfer) -> int:
        return 0 if self._transfer is None else self._transfer.save(store)
