"""Carries out the steps of an EAGLE-3 head, on rank 0 alone: entries from hidden states, drafts from entries.

Its plans are like the model's, but positions are places in the head's cache: where tokens have no entry, they are
smaller than those that keys are rotated by and noise is drawn for. Steps follow each other without waiting for tokens.
Knows nothing of requests beyond the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grammars.compiler import GrammarCompiler
from workers.config import EngineConfig
from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.step import ModelRunnerOutput, StepPlan
from workers.kv.paged_cache import CacheLayout, PagedCache
from workers.model.cache_spec import cache_groups
from workers.model.config import ModelConfig
from workers.model.heads.eagle3 import Eagle3Head
from workers.parallel import ParallelGroups, Shard
from workers.runtime.batching import InputBuffers, PreparedBatch
from workers.runtime.host_copy import read_later
from workers.runtime.plan_columns import Longs, PlanColumns
from workers.runtime.token_chooser import TokenChooser
from workers.sampling.params import SamplingParams
from workers.sampling.row_reports import Reported
from workers.speculation.drafters.draft_plan import Wait
from workers.speculation.drafters.feature_head import HeadEntries
from workers.speculation.features import FeatureRun

_WARM_UP_TOKENS = (1, 2, 4, 8, 16, 32, 128)  # attention picks its tile by the longest chunk


class Eagle3Runner:
    """One head and its KV cache. Not thread-safe."""

    def __init__(self, config: EngineConfig, model: ModelConfig, head: Eagle3Head) -> None:
        """config: of the draft engine; num_blocks are those of the head's cache. model: the head's sizes."""
        self._config = config
        self._head = head
        self._device = head.device
        groups = ParallelGroups(Shard(), self._device)
        self._layout = CacheLayout(
            cache_groups(model.cache_specs), range(1), groups.shard, config.block_size, head.dtype
        )
        self.cache = PagedCache(self._layout, [config.num_blocks], self._device)
        (self._layer_cache,) = self.cache.of_layers()
        most_seqs = config.max_num_seqs
        self._inputs = InputBuffers(
            max(config.max_num_batched_tokens, most_seqs),
            most_seqs,
            -(-model.max_position_embeddings // config.block_size),
            self._device,
        )
        grammars = GrammarCompiler(Path(config.model_dir) / "tokenizer.json", model.vocab_size, model.eos_token_ids)
        self._chooser = TokenChooser(groups, model.vocab_size, most_seqs, self._device, grammars)
        self._num_left_out = np.zeros(most_seqs, np.int64)
        self._last_tokens = torch.zeros(most_seqs, dtype=torch.int64, device=self._device)
        self._last_hidden = torch.zeros(most_seqs, head.hidden_size, dtype=head.dtype, device=self._device)

    def warm_up(self) -> None:
        """The one-time work of the first steps. Nothing is written to the cache."""
        config = self._config
        most = min(config.max_num_batched_tokens, self._inputs.max_blocks * config.block_size)
        for count in [n for n in _WARM_UP_TOKENS if n < most] + [most]:
            blocks = [[0] * -(-count // config.block_size)]
            sampled = SamplingParams(temperature=1.0, top_p=0.9)
            self.start(direct_plan([DirectChunk([0] * count, 0, count, blocks, 1, sampled)]))()

    def start(self, plan: StepPlan, entries: HeadEntries | None = None) -> Wait:
        """As in HeadRunner. Without entries all hidden states are those that its rows had last."""
        with torch.inference_mode(), self._on_device():
            tokens, order = self._compute(plan, entries)
            read = read_later(tokens)

        def wait() -> ModelRunnerOutput:
            by_index = dict(zip(order, read(), strict=True))
            return ModelRunnerOutput([by_index[index] for index in range(len(order))])

        return wait

    def _compute(self, plan: StepPlan, entries: HeadEntries | None) -> tuple[Tensor, Sequence[int]]:
        """int64 [rows]: the chosen tokens, and which of the plan's wanted logits each was chosen from."""
        self._inputs.apply(plan)
        self._chooser.take_rows(plan.new_rows)
        self._num_left_out[plan.rows] = 0 if entries is None else entries.num_left_out
        prepared = self._inputs.fill(plan, self._config.block_size)
        columns = PlanColumns.of(plan)
        self._set_positions(prepared, columns)
        batch = prepared.batch
        if prepared.pending is not None:
            where, rows = prepared.pending
            batch.token_ids.index_copy_(0, where, self._last_tokens[rows].clamp(min=0))
        hidden = self._head.forward(batch, self._layer_cache, self._entering(columns, entries))
        if prepared.last is None:
            return self._last_tokens[:0], ()
        hidden = hidden[batch.logit_rows]
        reported = Reported(prepared.sampling, prepared.pooled, self._head.hidden_size)
        self._chooser.begin(plan, prepared)
        tokens, _ = self._chooser.choose(self._head.logits(hidden), None, prepared, reported)
        at, rows = prepared.last
        self._last_tokens.index_copy_(0, rows, tokens[at])
        self._last_hidden.index_copy_(0, rows, hidden[at])
        return tokens, prepared.order.tolist()

    def _set_positions(self, prepared: PreparedBatch, columns: PlanColumns) -> None:
        """From places in the cache to positions, of the batch and of the noise."""
        left_out = self._num_left_out[columns.rows]
        if left_out.any():
            prepared.batch.positions.add_(self._sent(np.repeat(left_out, columns.num_tokens)))
            prepared.positions[:] += self._num_left_out[prepared.rows]

    def _entering(self, columns: PlanColumns, entries: HeadEntries | None) -> Tensor:
        """[tokens, hidden_size] of the batch's entries."""
        if entries is None or not entries.runs:
            return self._last_hidden[self._sent(np.repeat(columns.rows, columns.num_tokens).astype(np.int64))]
        order = range(len(entries.runs)) if columns.order is None else columns.order.tolist()
        runs: list[FeatureRun] = [run for index in order for run in entries.runs[index]]
        return self._head.fuse(torch.cat([run.rows for run in runs]))

    def _sent(self, values: Longs) -> Tensor:
        """On the device, without a wait of the host."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
