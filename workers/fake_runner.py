"""The fake engine's runner: carries out plans without weights, yet through a real KV cache.

Scheduler, loop, server, transfer, tiers and leases are the real ones; only the forward pass is replaced, by hashes
that are written to and read from the paged cache (workers.fake_model). So whole-cluster fault tests run in seconds, and
bytes that should never have been used show as wrong tokens. Knows nothing of requests beyond the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from workers.config import EngineConfig
from workers.errors import ModelError
from workers.fake_model import SlotCode, choose, position_weight, position_weights, token_hash
from workers.kv_transfer import FragmentGrid, KVTransfer
from workers.model.config import ModelConfig
from workers.step import ModelRunnerOutput, SampleSpec, ScheduledRequest, SchedulerOutput, pending_place

CACHE_BYTES = 64 << 20  # KV cache of one worker when the config does not say
_WORD_BYTES = 4


class FakeModelRunner:
    """One worker's KV cache [layers, blocks, kv_heads, 2, block_size, head_dim], as many bytes as a real model's."""

    def __init__(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> None:
        if config.tp * config.pp != 1:
            raise ModelError(f"runner=fake takes tp=1 and pp=1, not tp={config.tp} and pp={config.pp}")
        spec = model.cache_specs[0]
        head_bytes = spec.head_dim * dtype.itemsize
        if head_bytes % _WORD_BYTES:
            raise ModelError(f"runner=fake takes heads of whole {_WORD_BYTES}-byte words, not of {head_bytes} bytes")
        layers, heads, words = model.num_hidden_layers, spec.num_kv_heads, head_bytes // _WORD_BYTES
        block_bytes = layers * heads * 2 * config.block_size * head_bytes
        self._step_s, self._token_s = config.fake_step_s, config.fake_token_s
        self._block_size = config.block_size
        self._vocab_size = model.vocab_size
        self.num_blocks = config.num_blocks or max(1, CACHE_BYTES // block_bytes)
        shape = (layers, self.num_blocks, heads, 2, config.block_size, words)
        self.cache = torch.zeros(shape, dtype=torch.int32)
        self._words = self.cache.numpy().view(np.uint32)
        self._code = SlotCode(layers * heads * 2 * words)
        self._weights = self._code.weights.reshape(layers, heads, 2, words)
        self._transfer: KVTransfer | None = None
        self._last_sampled: Sequence[int] = ()  # in the last step, in its plan's order

    def attach(self, transfer: KVTransfer) -> None:
        """Give the runner its way to the KV tiers; without one, plans must not load or store."""
        self._transfer = transfer

    def grid(self, layers_per_fragment: int) -> FragmentGrid:
        """All of the model's KV."""
        layers, heads = self.cache.shape[0], self.cache.shape[2]
        group = layers_per_fragment or layers
        if layers % group:
            raise ModelError(f"layers_per_fragment={group} does not fit the stage's layers 0..{layers - 1}")
        return FragmentGrid(0, layers, group, 0, heads)

    def warm_up(self) -> None:
        """One small step, as a real runner does; it writes into block 0, which no request owns yet."""
        self.execute(SchedulerOutput([ScheduledRequest("", [0], 0, 0, [0], SampleSpec(0.0, 1.0, 0, 0, 0))]))

    # ------------------------------------------------------------------------------------------------------- one step
    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """As ModelRunner.start; all of the step is done when it returns."""
        output = self.execute(plan)
        return lambda: output

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Loads, hashes instead of a forward pass, stores, write-backs."""
        started = time.perf_counter()
        loaded = [0 if self._transfer is None else self._transfer.load(load) for load in plan.loads]
        if self._transfer is not None:
            for store in plan.stores:
                self._transfer.prepare(store)
        sampled = [token_id for r in plan.requests if (token_id := self._compute(r)) is not None]
        self._last_sampled = sampled
        if plan.requests:
            num_prefill_tokens = sum(r.num_scheduled_tokens for r in plan.requests if r.num_scheduled_tokens > 1)
            time.sleep(self._step_s + self._token_s * num_prefill_tokens)
        stored = [0 if self._transfer is None else self._transfer.save(store) for store in plan.stores]
        if self._transfer is not None:
            for write_back in plan.write_backs:
                self._transfer.write_back(write_back)
        return ModelRunnerOutput(sampled, loaded, stored, time.perf_counter() - started)

    def _compute(self, request: ScheduledRequest) -> int | None:
        """Write the slots of the scheduled tokens; the next token, when one is due."""
        start, end = request.start_position, request.start_position + request.num_scheduled_tokens
        before = summed = self._sum(request.block_table, 0, start)
        hashes: list[int] = []
        for position, known_id in enumerate(request.token_ids, start):
            place = pending_place(known_id)  # planned before the last step was through
            token_id = known_id if place is None else self._last_sampled[place]
            hashes.append(token_hash(summed, position, token_id))
            summed += position_weight(position) * hashes[-1]
        first = max(start, request.write_from)
        if first < end:
            self._write(request.block_table, first, hashes[first - start :])
        if request.sample is None:
            return None
        # Not from the sum at hand: what counts is what lies in the cache.
        summed = before + self._sum(request.block_table, start, end)
        sample = request.sample
        return choose(summed, sample.temperature, sample.seed, sample.position, self._vocab_size)

    def _write(self, block_table: Sequence[int], first: int, hashes: Sequence[int]) -> None:
        positions = np.arange(first, first + len(hashes))
        blocks = np.array(block_table)[positions // self._block_size]
        layers, _, heads, _, _, words = self._words.shape
        encoded = self._code.encode(hashes).reshape(len(hashes), layers, heads, 2, words)
        self._words[:, blocks, :, :, positions % self._block_size] = encoded

    def _sum(self, block_table: Sequence[int], first: int, last: int) -> int:
        """Over the slots of positions first .. last - 1, read through the block table."""
        if first >= last:
            return 0
        size = self._block_size
        first_block = first // size
        blocks = self._words[:, list(block_table[first_block : -(-last // size)])]
        weighted = np.einsum("lbhksw,lhkw->bs", blocks, self._weights).reshape(-1)
        hashes = self._code.decode(weighted[first - first_block * size : last - first_block * size])
        return int((hashes * position_weights(first, last)).sum(dtype=np.uint32))
