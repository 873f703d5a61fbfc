"""The fake engine's runner: carries out plans without weights, yet through a real KV cache.

Scheduler, loop, server, transfer, tiers and leases are the real ones; only the forward pass is replaced, by hashes
that are written to and read from the paged cache (workers.runtime.fake.model). So whole-cluster fault tests run in
seconds, and bytes that should never have been used show as wrong tokens. Knows nothing of requests beyond the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvstore.store import FragmentStore
from workers.config import EngineConfig
from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.step import Ints, ModelRunnerOutput, StepPlan, TransferDone
from workers.errors import ModelError
from workers.kv.connector import KVConnector
from workers.kv.paged_cache import CacheLayout, PagedCache
from workers.model.cache_spec import CacheSpec, cache_groups
from workers.model.config import ModelConfig
from workers.parallel import Shard
from workers.runtime.fake.model import (
    SlotCode,
    adapter_word,
    choose,
    fake_logprobs,
    position_weight,
    position_weights,
    token_hash,
)
from workers.runtime.rank_adapters import RankAdapters
from workers.runtime.rank_state import RankState
from workers.runtime.step_transfers import finish_ended
from workers.sampling.params import PooledHidden, RowReport

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
        self._step_s, self._token_s = config.fake_step_s, config.fake_token_s
        self._block_size = config.block_size
        self._vocab_size = model.vocab_size
        groups = cache_groups([CacheSpec(heads, words)] * layers)
        layout = CacheLayout(groups, range(layers), Shard(), config.block_size, torch.int32)
        num_blocks = config.num_blocks or max(1, CACHE_BYTES // layout.block_bytes(groups[0]))
        self.grammars = None  # what it chooses goes by no grammar
        self.cache = PagedCache(layout, [num_blocks], torch.device("cpu"))
        self._words = self.cache.tensors[0][0].numpy().view(np.uint32)
        self._code = SlotCode(layers * heads * 2 * words)
        self._weights = self._code.weights.reshape(layers, heads, 2, words)
        context_tokens = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
        self._state = RankState(config.max_num_seqs, -(-context_tokens // config.block_size))
        self._last_tokens = np.zeros(config.max_num_seqs, np.int64)  # of each row of the state
        slot_words = self._adapter_words = {-1: 0}  # by slot; -1: no adapter
        self.adapters: RankAdapters[int] | None = None
        if config.enable_lora:
            self.adapters = RankAdapters(lambda adapter, _: adapter_word(adapter.digest), slot_words.__setitem__)
        self.attach(KVConnector(self.cache.memories(0, "none"), self.cache.grids(0), FragmentStore(())))

    def attach(self, connector: KVConnector) -> None:
        """Give the runner its way to the KV tiers; at first it has none, and transfers end with no blocks."""
        self._connector = connector

    def on_progress(self, note: Callable[[], None]) -> None:
        """As TorchModelRunner.on_progress; a fake step is over before anybody asks."""

    def close(self) -> None:
        """End what runs beside its steps."""
        if self.adapters is not None:
            self.adapters.close()

    def ended_transfers(self) -> Sequence[int]:
        """As in ModelRunner."""
        return [*self._connector.ended(), *(() if self.adapters is None else self.adapters.ended())]

    def poll(self, transfer_ids: Sequence[int]) -> Sequence[TransferDone]:
        """As in ModelRunner: with one rank a step finds out itself."""
        return ()

    def recover(self) -> None:
        """As in ModelRunner."""
        if self.adapters is not None:
            self.adapters.forget()
        self._connector.forget()

    def warm_up(self) -> None:
        """One small step, as a real runner does; it writes into block 0, which no request owns yet."""
        self.execute(direct_plan([DirectChunk([0], 0, 0, [[0]], 1)]))

    # ------------------------------------------------------------------------------------------------------- one step
    def start(self, plan: StepPlan, ended: Sequence[TransferDone] = ()) -> Callable[[], ModelRunnerOutput]:
        """As ModelRunner.start; all of the step is done when it returns."""
        output = self.execute(plan)
        return lambda: output

    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        """Hashes instead of a forward pass; transfers go on beside it."""
        self._state.apply(plan)
        if self.adapters is not None:
            self.adapters.carry_out(plan.adapter_orders, plan.is_full)
        for load in plan.loads:
            self._connector.start_load(load)
        for store in plan.stores:
            if not store.is_copied:
                self._connector.prepare(store)
        sampled: list[int] = []
        known = np.cumsum(plan.num_known) - plan.num_known
        for i in range(plan.num_requests):
            sampled += self._compute(plan, i, plan.token_ids[known[i] : known[i] + plan.num_known[i]])
        if plan.num_requests:
            num_prefill_tokens = int(plan.num_tokens[plan.num_tokens > 1].sum())
            time.sleep(self._step_s + self._token_s * num_prefill_tokens)
        for store in plan.stores:
            self._connector.start_store(store)
        ended = finish_ended(plan, self._connector)
        if self.adapters is not None:
            ended += self.adapters.finish_ended()
        return ModelRunnerOutput(sampled, self._reports(plan, sampled), ended)

    def _reports(self, plan: StepPlan, sampled: Sequence[int]) -> list[RowReport | None]:
        """Of the sampled tokens, where one of the plan's requests asks for them. An embedding is made of the token."""
        rows, sampling, pools = np.repeat(plan.rows, plan.num_logits), self._state.sampling, self._state.pools
        if not (sampling.has_logprobs[rows] | pools[rows]).any():
            return []
        return [
            PooledHidden([1.0, float(token_id)])
            if pools[row]
            else fake_logprobs(token_id, int(sampling.num_top_logprobs[row]), self._vocab_size)
            if sampling.has_logprobs[row]
            else None
            for row, token_id in zip(rows, sampled, strict=True)
        ]

    def _compute(self, plan: StepPlan, index: int, known_ids: Ints) -> list[int]:
        """Write the slots of a request's scheduled tokens; the choices at its wanted positions."""
        row, start, count = (int(column[index]) for column in (plan.rows, plan.start_positions, plan.num_tokens))
        block_table, end = self._state.block_tables[0][row], start + count
        token_ids = known_ids.tolist()
        if len(token_ids) < count:  # planned before the last step was through
            token_ids.append(int(self._last_tokens[row]))
        before = summed = self._sum(block_table, 0, start)
        word = self._adapter_words[int(self._state.adapter_slots[row])]
        hashes: list[int] = []
        for position, token_id in enumerate(token_ids, start):
            hashes.append(token_hash(summed + word, position, token_id))
            summed += position_weight(position) * hashes[-1]
        first = max(start, int(plan.write_from[index]))
        if first < end:
            self._write(block_table, first, hashes[first - start :])
        wanted = int(plan.num_logits[index])
        choices: list[int] = []
        for position in range(end - wanted, end):
            # Not from the sum at hand: what counts is what lies in the cache.
            summed = before + self._sum(block_table, start, position + 1)
            temperature, seed = float(self._state.sampling.temperature[row]), int(self._state.sampling.seed[row])
            counter = position + 1 - int(self._state.num_prompt_tokens[row])
            choices.append(choose(summed, temperature, seed, counter, self._vocab_size))
        if wanted:
            self._last_tokens[row] = choices[-1]
        return choices

    def _write(self, block_table: Ints, first: int, hashes: Sequence[int]) -> None:
        positions = np.arange(first, first + len(hashes))
        blocks = block_table[positions // self._block_size]
        layers, _, heads, _, _, words = self._words.shape
        encoded = self._code.encode(hashes).reshape(len(hashes), layers, heads, 2, words)
        self._words[:, blocks, :, :, positions % self._block_size] = encoded

    def _sum(self, block_table: Ints, first: int, last: int) -> int:
        """Over the slots of positions first .. last - 1, read through the block table."""
        if first >= last:
            return 0
        size = self._block_size
        first_block = first // size
        blocks = self._words[:, block_table[first_block : -(-last // size)]]
        weighted = np.einsum("lbhksw,lhkw->bs", blocks, self._weights).reshape(-1)
        hashes = self._code.decode(weighted[first - first_block * size : last - first_block * size])
        return int((hashes * position_weights(first, last)).sum(dtype=np.uint32))
