"""Carries out the plan of a step on one rank: pulls blocks, runs the forward pass, chooses tokens, publishes blocks.

The only file between the scheduler and the tensors. Knows nothing of requests beyond the plan.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from workers.batching import prepare_batch
from workers.config import EngineConfig, ModelConfig
from workers.errors import ModelError
from workers.kv_transfer import FragmentGrid, KVTransfer
from workers.loader import Checkpoint, Weights
from workers.models.llama import LlamaStage, rope_cos_sin
from workers.parallel import ParallelGroups
from workers.sampler import sample
from workers.step import BlockTransfer, ModelRunnerOutput, SampleSpec, ScheduledRequest, SchedulerOutput

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_CACHE_BYTES = 256 << 20  # KV cache of one worker on a CPU when the config does not say
CUDA_CACHE_SHARE = 0.85  # of the memory that is free after the weights are loaded


def pick_device(config: EngineConfig, local_rank: int) -> torch.device:
    """The rank's device."""
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if wanted == "cuda" else torch.device(wanted)


def pick_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache: what the config says, else bf16 on CUDA and fp32 on CPU."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


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
        self._device = device
        self._groups = groups
        self._vocab_size = model.vocab_size
        self._block_size = config.block_size
        dtype = pick_dtype(config, device)
        self._stage = LlamaStage(model, weights or Checkpoint(Path(config.model_dir), dtype, device), groups)
        self._cos_sin = rope_cos_sin(model, model.max_position_embeddings, device)
        self.num_blocks = config.num_blocks or self._blocks_that_fit(config, model, dtype)
        (self.num_blocks,) = groups.min_over_ranks([self.num_blocks])
        layers, heads = len(self._stage.layers), model.num_key_value_heads // config.tp
        # Zeros, not empty: attention multiplies masked slots by 0, and 0 x NaN is NaN.
        self.cache = torch.zeros(
            (layers, self.num_blocks, heads, 2, config.block_size, model.head_dim), dtype=dtype, device=device
        )
        self._layer_caches = list(self.cache.unbind(0))
        self._transfer: KVTransfer | None = None

    def _blocks_that_fit(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        heads, layers = model.num_key_value_heads // config.tp, len(self._stage.layers)
        block_bytes = layers * heads * 2 * config.block_size * model.head_dim * dtype.itemsize
        if self._device.type == "cuda":
            free_bytes = int(torch.cuda.mem_get_info(self._device)[0] * CUDA_CACHE_SHARE)
        else:
            free_bytes = CPU_CACHE_BYTES // (config.tp * config.pp)
        if free_bytes < block_bytes:
            raise ModelError(f"no memory for one KV block of {block_bytes} bytes ({free_bytes} bytes are free)")
        return free_bytes // block_bytes

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

    @property
    def num_layout_rejects(self) -> int:
        """Fragments that verified but were not of the expected length."""
        return 0 if self._transfer is None else self._transfer.num_layout_rejects

    def warm_up(self) -> None:
        """One small step, so that the first request does not pay for what the first step sets up. On all ranks at once.

        It writes into block 0, which no request owns yet.
        """
        chunk = ScheduledRequest("", [0, 0], 0, 0, [0, 0], None)
        decode = ScheduledRequest("", [0], 0, 0, [0], SampleSpec(0.0, 1.0, 0, 0, 0))
        self.execute(SchedulerOutput([chunk, decode]))

    # ------------------------------------------------------------------------------------------------------- one step
    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Loads, forward pass, stores, write-backs."""
        started = time.perf_counter()
        loaded = [self._load(load) for load in plan.loads]
        tokens: Tensor | None = None
        order: list[int] = []
        if plan.requests:
            prepared = prepare_batch(plan.requests, self._block_size, self._device)
            order = prepared.order
            logits = self._stage.forward(prepared.batch, self._layer_caches, self._cos_sin)
            if logits is not None and order:
                tokens = sample(logits, prepared.samples, self._groups, self._vocab_size)
            tokens = self._groups.tokens_to_leader(tokens, len(order))
        stored = [self._save(store) for store in plan.stores]
        if self._transfer is not None:
            for write_back in plan.write_backs:
                self._transfer.write_back(write_back)
        counts = self._groups.min_over_ranks([*loaded, *stored])
        sampled = [0] * (0 if tokens is None else len(tokens))
        if tokens is not None:
            for place, token_id in zip(order, tokens.tolist(), strict=True):
                sampled[place] = token_id
        duration_s = time.perf_counter() - started
        return ModelRunnerOutput(sampled, counts[: len(loaded)], counts[len(loaded) :], duration_s)

    def _load(self, load: BlockTransfer) -> int:
        return 0 if self._transfer is None else self._transfer.load(load)

    def _save(self, store: BlockTransfer) -> int:
        return 0 if self._transfer is None else self._transfer.save(store)
