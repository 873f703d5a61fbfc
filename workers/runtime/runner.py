"""Carries out the plan of a step on one rank: starts transfers, runs the forward pass, chooses tokens.

The only file between the scheduler and the tensors. Knows nothing of requests beyond the plan.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from grammars.compiler import GrammarCompiler
from kvstore.store import FragmentStore
from workers.config import EngineConfig
from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.step import ModelRunnerOutput, StepPlan, TransferDone
from workers.errors import ModelError
from workers.kv.connector import KVConnector
from workers.kv.paged_cache import CacheLayout, PagedCache
from workers.kv.schemes.named import scheme_of
from workers.model.config import ModelConfig
from workers.model.loader import Checkpoint, Weights
from workers.model.lora.slots import LoraSlots
from workers.model.stage import build_stage
from workers.model.tensor_layout import check_checkpoint
from workers.parallel import ParallelGroups
from workers.runtime.batching import NO_PADDING, InputBuffers, PreparedBatch
from workers.runtime.chosen import NOTHING_CHOSEN, Chosen
from workers.runtime.compiled.stage import CompiledStage, compiled_stage
from workers.runtime.coordination.relay import TokenRelay
from workers.runtime.graphs import GraphedStage
from workers.runtime.host_copy import read_later
from workers.runtime.pool_needs import PoolNeeds
from workers.runtime.rank_adapters import RankAdapters, reason_of, with_reasons
from workers.runtime.step_threads import StepThreads
from workers.runtime.step_transfers import STORE_GRACE_S, awaited, ended_of, finish_ended, poll_in_step
from workers.runtime.token_chooser import TokenChooser
from workers.sampling.params import GREEDY, SamplingParams
from workers.sampling.row_reports import Reported
from workers.speculation.features import StepFeatures, features_of

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
    """Whether async scheduling is on: as configured, else on CUDA with one pipeline stage."""
    if config.async_scheduling is not None:
        return config.async_scheduling
    return device.type == "cuda" and config.pp == 1


class TorchModelRunner:
    """One rank's weights and KV cache."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        groups: ParallelGroups,
        device: torch.device,
        weights: Weights | None = None,
        feature_layers: Sequence[int] = (),
    ) -> None:
        """weights: those of config.model_dir unless others are given. feature_layers: before which a drafter wants the
        hidden states of all tokens, from this rank."""
        self._config = config
        self._device = device
        self._groups = groups
        self._dtype = pick_dtype(config, device)
        if weights is None:
            check_checkpoint(Path(config.model_dir), model)
            weights = Checkpoint(Path(config.model_dir), self._dtype, device)
        self._lora = lora = LoraSlots.for_stage(config, model.num_hidden_layers, groups.shard, self._dtype, device)
        self.adapters = None if lora is None else RankAdapters(lora.load, lora.put)
        self._stage = build_stage(model, weights, groups, config.batch_invariant, self._lora)
        self._feature_layers = tuple(feature_layers)
        self._stage.feature_layers = tuple(sorted(set(feature_layers)))
        self._context_tokens = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
        scheme = scheme_of(config)
        cached = scheme.groups(model.cache_specs)
        self._layout = CacheLayout(
            cached, self._stage.layer_range, groups.shard, config.block_size, self._dtype, scheme
        )
        max_num_seqs = max(config.max_num_seqs, _WARM_UP_SEQS)
        self._inputs = InputBuffers(
            max(config.max_num_batched_tokens, max_num_seqs, _WARM_UP_TOKENS),
            max_num_seqs,
            -(-self._context_tokens // config.block_size),
            device,
            len(cached),
        )
        # With async scheduling a plan may leave out the token that a row got last: nobody has read it yet.
        self._keeps_tokens = schedules_async(config, device)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._relay = TokenRelay(groups, max_num_seqs, self._keeps_tokens) if config.pp > 1 else None
        tokenizer_file = Path(config.model_dir) / "tokenizer.json"
        self.grammars = GrammarCompiler(tokenizer_file, model.vocab_size, model.eos_token_ids)
        self._chooser = TokenChooser(groups, model.vocab_size, max_num_seqs, device, self.grammars)
        self._threads: StepThreads | None = None  # set where a step's number of threads is chosen
        self._graphs: GraphedStage | None = None
        self._compiled: CompiledStage | None = None
        self.replays = True  # graphs and compiled layers, where there are any; a benchmark compares
        self.cache = self._make_cache(groups.min_over_ranks(self._pick_num_blocks()))
        self.attach(KVConnector(self.cache.memories(0, "none"), self.cache.grids(0), FragmentStore(())))

    def _make_cache(self, num_blocks: Sequence[int]) -> PagedCache:
        cache = PagedCache(self._layout, num_blocks, self._device)
        self._layer_caches = cache.of_layers()
        return cache

    def _pick_num_blocks(self) -> list[int]:
        num_chunks = self._config.pp + self._keeps_tokens
        needs = PoolNeeds(self._config, self._layout.block_size, self._context_tokens, num_chunks)
        return needs.num_blocks(self._layout, self._free_bytes)

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(self._free_bytes_beside_steps() * CUDA_CACHE_SHARE)
        return CPU_CACHE_BYTES // self._groups.world_size

    def _free_bytes_beside_steps(self) -> int:
        """Free device memory beside the largest steps; measured by a warm-up on a cache of one block."""
        before, _ = torch.cuda.mem_get_info(self._device)
        self.cache = self._make_cache([1] * len(self._layout.groups))
        self.attach(KVConnector(self.cache.memories(0, "none"), self.cache.grids(0), FragmentStore(())))
        self.warm_up()
        torch.cuda.synchronize(self._device)
        needed = before - torch.cuda.mem_get_info(self._device)[0]
        self._graphs = None  # captured with the addresses of the small cache
        del self._layer_caches, self.cache, self._connector
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0] - needed

    def attach(self, connector: KVConnector) -> None:
        """Give the rank its way to the KV tiers; at first it has none, and transfers end with no blocks."""
        self._connector = connector

    @property
    def is_compiled(self) -> bool:
        """Whether steps run with compiled layers."""
        return self._compiled is not None

    def on_progress(self, note: Callable[[], None]) -> None:
        """Call this for every layer from now on."""
        self._stage.on_layer = note

    def close(self) -> None:
        """End what runs beside the steps."""
        self._chooser.close()
        if self.adapters is not None:
            self.adapters.close()

    def ended_transfers(self) -> Sequence[int]:
        """As in ModelRunner."""
        return [*self._connector.ended(), *(() if self.adapters is None else self.adapters.ended())]

    def poll(self, transfer_ids: Sequence[int]) -> Sequence[TransferDone]:
        """As in ModelRunner."""
        counts = self._groups.min_over_ranks([self._poll_one(transfer_id) for transfer_id in transfer_ids])
        ended = ended_of(transfer_ids, counts)
        for done in ended:
            self._connector.claim(done)
        if self.adapters is None:
            return ended
        # A read that has ended on every rank is one of each rank's adapters: all of them ask for the reasons.
        failed = {done.transfer_id for done in ended if self.adapters.poll(done.transfer_id) is not None}
        failed &= {done.transfer_id for done in ended if not done.num_blocks}
        claimed = self.adapters.claim(ended)
        return [
            with_reasons(done, self._groups.exchange_reasons(reason_of(done))) if done.transfer_id in failed else done
            for done in claimed
        ]

    def _poll_one(self, transfer_id: int) -> int:
        count = None if self.adapters is None else self.adapters.poll(transfer_id)
        return self._connector.poll(transfer_id) if count is None else count

    def recover(self) -> None:
        """As in ModelRunner."""
        if self._relay is not None:
            self._relay.reset()
        if self.adapters is not None:
            self.adapters.forget()
        self._connector.forget()

    def warm_up(self) -> None:
        """Does the one-time work of the first steps and captures the graphs. On all ranks at once.

        Its first step writes into block 0, which no request owns yet.
        """
        self.execute(direct_plan([DirectChunk([0, 0], 0, 0, self._zeros(2)), self._sampled_token(0, GREEDY)]))
        config = self._config
        if self._uses_graphs:
            graphs = GraphedStage(self._stage, self._layer_caches, self._inputs)
            is_leader = self._groups.shard.rank == 0
            with torch.inference_mode(), self._on_device():
                graphs.capture(config.max_num_seqs, config.max_num_batched_tokens, config.block_size, is_leader)
            self._graphs = graphs
        else:
            self._compiled = compiled_stage(config, self._stage, self._layer_caches, len(self._layout.groups))
        if self._device.type == "cuda":
            self._run_largest_steps()
        elif not config.batch_invariant:  # which promises bits that depend on the number of threads
            threads = StepThreads(config.num_threads)
            threads.measure(self._run_decodes, self._measured_sizes(), lambda n: self._groups.min_over_ranks([n])[0])
            self._threads = threads if threads.vary else None

    def _measured_sizes(self) -> list[int]:
        most = min(self._config.max_num_seqs, self._config.max_num_batched_tokens)
        return [size for size in (1, 4, 16, 64) if size < most] + [most]

    def _run_decodes(self, num_requests: int) -> None:
        self.execute(direct_plan([self._sampled_token(1, GREEDY)] * num_requests))

    def _run_largest_steps(self) -> None:
        """Settles how much memory steps take, and compiles attention for all its tiles.

        Runs after capture: capturing frees unused memory.
        """
        config = self._config
        most = min(config.max_num_batched_tokens, self._context_tokens)
        for num_tokens in [n for n in _CHUNKS_OF_OTHER_TILES if n < most] + [most]:
            blocks = self._zeros(-(-num_tokens // config.block_size))
            self.execute(direct_plan([DirectChunk([0] * num_tokens, 0, num_tokens, blocks)]))
        sampled = self._sampled_token(1, SamplingParams(temperature=1.0, top_p=0.9))
        self.execute(direct_plan([sampled] * min(config.max_num_seqs, config.max_num_batched_tokens)))
        if self._lora is not None:  # an empty slot: compiles what adds adapters
            self.execute(direct_plan([replace(sampled, adapter_slot=0)]))

    def _zeros(self, num_blocks: int) -> list[list[int]]:
        return [[0] * num_blocks for _ in self._layout.groups]

    def _sampled_token(self, write_from: int, sampling: SamplingParams) -> DirectChunk:
        return DirectChunk([0], 0, write_from, self._zeros(1), 1, sampling)

    def _on_device(self) -> AbstractContextManager[object]:
        """The current device is a setting of the thread, and this may be any."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def _uses_graphs(self) -> bool:
        wanted = self._config.cuda_graphs
        return self._device.type == "cuda" if wanted is None else wanted

    # ------------------------------------------------------------------------------------------------------- one step
    def execute(self, plan: StepPlan) -> ModelRunnerOutput:
        """One step, to its end; transfers go on beside it."""
        return self.start(plan)()

    def start(self, plan: StepPlan, ended: Sequence[TransferDone] = ()) -> Callable[[], ModelRunnerOutput]:
        """As execute, but on CUDA the forward pass may still run; what is returned waits for its tokens."""
        if self._threads is not None:
            longest_context = int((plan.start_positions + plan.num_tokens).max(initial=0))
            self._threads.set_for(int(plan.num_tokens.sum()), longest_context)
        with torch.inference_mode(), self._on_device():
            return self._start(plan, list(ended))

    def _start(self, plan: StepPlan, ended: list[TransferDone]) -> Callable[[], ModelRunnerOutput]:
        self._inputs.apply(plan)
        self._chooser.take_rows(plan.new_rows)
        for done in ended:
            self._connector.finish(done)
        if self.adapters is not None:
            self.adapters.carry_out(plan.adapter_orders, plan.is_full)
        for load in plan.loads:
            self._connector.start_load(load)
        for store in plan.stores:
            if not store.is_copied:
                self._connector.prepare(store)
        chosen = NOTHING_CHOSEN
        if plan.num_requests:  # its tokens are read before the gathers, which follow on the same stream
            chosen = self._compute(plan if self._relay is None else self._relay.complete(plan))
        for store in plan.stores:
            self._connector.start_store(store)
        is_alone = self._groups.world_size == 1
        if plan.ends_prompts and not is_alone and self._steps_together:
            self._connector.wait(awaited(plan), STORE_GRACE_S)
            ended += poll_in_step([store.transfer_id for store in awaited(plan)], self._connector, self._groups)

        def wait() -> ModelRunnerOutput:
            sampled, found = chosen.in_plan_order()
            if is_alone:
                with torch.inference_mode(), self._on_device():
                    ended.extend(finish_ended(plan, self._connector))
                    if self.adapters is not None:
                        ended.extend(self.adapters.finish_ended())
            return ModelRunnerOutput(sampled, found, ended, chosen.features)

        return wait

    @property
    def _steps_together(self) -> bool:
        """Whether all ranks carry out the same step at the same time, and the leader's engine waits for it."""
        return self._device.type == "cpu" and self._config.pp == 1 and not self._keeps_tokens

    def _compute(self, plan: StepPlan) -> Chosen:
        """The forward pass and the choice of tokens; where they go is up to the stage."""
        tokens: Tensor | None = None
        numbers: Tensor | None = None
        features: list[Tensor] = []
        prepared, logits, hidden = self._forward(plan, features)
        reported = Reported(prepared.sampling, prepared.pooled, self._stage.hidden_size)
        if logits is not None and len(prepared.order):
            tokens, numbers = self._choose(logits, hidden, prepared, reported)
            if prepared.last is not None and self._keeps_tokens:
                at, rows = prepared.last
                self._last_tokens.index_copy_(0, rows, tokens if len(at) == len(tokens) else tokens[at])
        read, read_numbers = read_later(tokens), read_later(numbers)
        if self._relay is not None and len(prepared.order):
            if self._stage.is_last:
                self._relay.send(read, read_numbers, numbers is not None)
            read, read_numbers = self._relay.receive(prepared.rows, reported.shape)
        return Chosen(prepared, reported, read, read_numbers, self._features(plan, prepared, features))

    def _features(self, plan: StepPlan, prepared: PreparedBatch, found: Sequence[Tensor]) -> StepFeatures | None:
        """In tensors of their own: the next replay of a graph overwrites what was found."""
        if not found:
            return None
        by_layer = dict(zip(self._stage.feature_layers, found, strict=True))
        wanted = [by_layer[layer][: prepared.num_tokens] for layer in self._feature_layers]
        return features_of(plan, torch.cat(wanted, dim=-1))

    def _forward(self, plan: StepPlan, features: list[Tensor]) -> tuple[PreparedBatch, Tensor | None, Tensor | None]:
        """The batch; on the last stage its wanted rows' logits, and their hidden states where some are pooled. features
        gets those that a drafter wants."""
        state = self._inputs.state
        pools, is_adapted = bool(state.pools[plan.rows].any()), bool((state.adapter_slots[plan.rows] >= 0).any())
        graphs = self._graphs if self.replays and not (pools or is_adapted) else None
        padding = None if graphs is None else graphs.padding_for(plan)
        config = self._config
        prepared = self._inputs.fill(plan, config.block_size, config.batch_invariant, padding or NO_PADDING)
        self._chooser.begin(plan, prepared)
        if self._lora is not None:
            self._lora.begin(prepared.adapter_slots, config.batch_invariant)
        batch, received = prepared.batch, None
        if prepared.pending is not None:
            where, rows = prepared.pending
            # After NO_TOKEN the results of this step are not used.
            batch.token_ids.index_copy_(0, where, self._last_tokens[rows].clamp(min=0))
        if not self._stage.is_first:
            shape = (2, len(batch.token_ids), self._stage.hidden_size)
            received = self._groups.recv_from_previous_stage(shape, self._dtype)
        graphs = None if padding is None else graphs
        if pools and self._stage.is_last:
            hidden = self._stage.final_hidden(batch, self._layer_caches, received, features)
            return prepared, self._stage.logits(hidden), hidden
        out = self._run_stage(plan, prepared, received, graphs, features)
        if not self._stage.is_last:
            # A graph's results lie where the next replay writes its own, which does not wait for the next stage.
            self._groups.send_to_next_stage(out if graphs is None else out.clone())
            return prepared, None, None
        return prepared, out[: len(prepared.positions)], None

    def _run_stage(
        self,
        plan: StepPlan,
        prepared: PreparedBatch,
        received: Tensor | None,
        graphs: GraphedStage | None,
        features: list[Tensor],
    ) -> Tensor:
        """As Stage.forward."""
        if graphs is not None:
            return graphs.run(prepared, received, features)
        if self._compiled is not None and self.replays and prepared.writes_all:
            return self._compiled.forward(prepared.batch, received, features)
        return self._stage.forward(prepared.batch, self._layer_caches, received, features)

    def _choose(
        self, logits: Tensor, hidden: Tensor | None, prepared: PreparedBatch, reported: Reported
    ) -> tuple[Tensor, Tensor | None]:
        return self._chooser.choose(logits, hidden, prepared, reported)
