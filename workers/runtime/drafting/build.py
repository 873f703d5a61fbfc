"""Puts a worker's speculative decoding together: its drafter, with a draft model or a head where there is one, and step
costs.

Both run on rank 0 alone: they are small, and their steps would mostly wait for messages between ranks. They have no
adapters, and propose for requests that have one as for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from workers.config import EngineConfig, SpeculativeOptions
from workers.model.config import ModelConfig
from workers.model.heads.eagle3 import Eagle3Head, read_embedding
from workers.model.heads.eagle3_config import Eagle3Config, read_eagle3
from workers.model.identity import weights_identity
from workers.model.loader import Checkpoint
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import LoadedRunner, kv_fingerprint
from workers.runtime.drafting.eagle3_runner import Eagle3Runner
from workers.runtime.runner import TorchModelRunner, pick_dtype
from workers.speculation.drafters.draft_model import DraftModel
from workers.speculation.drafters.draft_plan import DraftLimits
from workers.speculation.drafters.drafter import Drafter
from workers.speculation.drafters.feature_head import BEFORE_FIRST, FeatureHead
from workers.speculation.drafters.forced import ForcedTokens, WithinGrammar
from workers.speculation.drafters.ngram import NgramDrafter
from workers.speculation.drafters.sequences import DraftSequences
from workers.speculation.drafters.suffix import SuffixDrafter
from workers.speculation.measure import measure_step_costs
from workers.speculation.speculator import Speculator
from workers.speculation.step_costs import StepCosts

_MOST_CACHE_BYTES = 64 << 20  # of the draft, on a CPU
_MOST_CACHE_SHARE = 0.1  # of the memory that is free, on CUDA


def load_draft(config: EngineConfig, device: torch.device) -> Drafter | None:
    """The draft model or the head, warmed up, and its steps measured; None: the method has none. Raises ModelError.

    Before the model: on CUDA that takes the memory that is left.
    """
    options = config.speculative
    if options.method == "eagle3":
        return _load_eagle3(config, device)
    if options.method != "draft_model":
        return None
    model = load_config(options.model, config.ignore_keys, config.plugins)
    draft = _draft_config(config, model, device)
    runner = TorchModelRunner(draft, model, ParallelGroups.connect(Shard(), device, "", ""), device)
    runner.warm_up()
    costs = measure_costs(draft, model, runner) if options.enable_adaptive_verification else None
    weights = weights_identity(Path(options.model), model, draft.runner)
    sequences = DraftSequences(
        _block_pools(draft, runner),
        kv_fingerprint(draft, model, pick_dtype(draft, device), weights),
        draft.max_num_seqs,
    )
    limits = DraftLimits(draft.max_num_seqs, draft.max_num_batched_tokens, model.max_position_embeddings)
    return DraftModel(runner, sequences, limits, costs, options.draft_temperature_scale, _own_stream(device))


def feature_layers(config: EngineConfig, shard: Shard) -> tuple[int, ...]:
    """Of the model: before them the drafter wants the hidden states, from rank 0. Raises ModelError."""
    if config.speculative.method != "eagle3" or shard.rank != 0:
        return ()
    return _read_eagle3(config).feature_layers


def _read_eagle3(config: EngineConfig) -> Eagle3Config:
    model = load_config(config.model_dir, config.ignore_keys, config.plugins)
    return read_eagle3(Path(config.speculative.model), model, config.ignore_keys)


def _load_eagle3(config: EngineConfig, device: torch.device) -> FeatureHead:
    options, head = config.speculative, _read_eagle3(config)
    target = load_config(config.model_dir, config.ignore_keys, config.plugins)
    draft = replace(_draft_config(config, head.model, device), model_dir=config.model_dir)  # whose tokenizer it has
    dtype, groups = pick_dtype(config, device), ParallelGroups(Shard(), device)
    weights, of_target = (Checkpoint(Path(path), dtype, device) for path in (options.model, config.model_dir))
    embedding = read_embedding(head, weights, target, of_target, groups)
    runner = Eagle3Runner(draft, head.model, Eagle3Head(head, weights, groups, embedding))
    runner.warm_up()
    limits = DraftLimits(draft.max_num_seqs, draft.max_num_batched_tokens, target.max_position_embeddings)
    costs = None
    if options.enable_adaptive_verification:
        costs = measure_step_costs(
            runner, limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_context_tokens, draft.block_size, 1
        )
    pools = BlockPools([BlockPool(draft.num_blocks, draft.block_size, draft.enable_prefix_caching)])
    # Its blocks never leave this process: no other head's need to be told from them.
    sequences = DraftSequences(pools, b"eagle3", draft.max_num_seqs, BEFORE_FIRST)
    return FeatureHead(runner, sequences, limits, costs, options.draft_temperature_scale)


def _own_stream(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """For the draft's steps: on CUDA they would otherwise wait for the model's, beside which they may run."""
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)
    return lambda: torch.cuda.stream(stream)


def _draft_config(config: EngineConfig, model: ModelConfig, device: torch.device) -> EngineConfig:
    """The draft's engine: one rank, exact KV, and steps that follow each other without waiting for tokens. Its logits
    may have other bits in another batch: that changes what is proposed, and no token of a stream."""
    draft = replace(
        config,
        model_dir=config.speculative.model,
        tp=1,
        pp=1,
        batch_invariant=False,
        async_scheduling=True,
        kv_encoding="none",
        kv_cache_dtype="auto",
        enable_lora=False,
        speculative=SpeculativeOptions(),
        max_model_len=0,
    )
    return replace(draft, num_blocks=config.speculative.draft_num_blocks or _pick_num_blocks(draft, model, device))


def _pick_num_blocks(draft: EngineConfig, model: ModelConfig, device: torch.device) -> int:
    """As many as all sequences may need, within a share of the memory; at least one whole context."""
    size = draft.block_size
    slot_elements = sum(spec.num_planes * spec.num_kv_heads * spec.head_dim for spec in model.cache_specs)
    block_bytes = slot_elements * size * pick_dtype(draft, device).itemsize
    free = _MOST_CACHE_BYTES
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0] * _MOST_CACHE_SHARE)
    longest = -(-model.max_position_embeddings // size)
    return max(longest, min(draft.max_num_seqs * longest, free // block_bytes))


def _block_pools(draft: EngineConfig, runner: TorchModelRunner) -> BlockPools:
    groups = runner.cache.layout.groups
    pools = [BlockPool(count, draft.block_size, draft.enable_prefix_caching) for count in runner.cache.num_blocks]
    return BlockPools(pools, [group.spec.window for group in groups])


def measure_costs(config: EngineConfig, model: ModelConfig, runner: LoadedRunner) -> StepCosts:
    """Times of the runner's steps. On all ranks at once, before requests come."""
    longest = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    num_groups = len(runner.cache.layout.groups)
    return measure_step_costs(
        runner, config.max_num_seqs, config.max_num_batched_tokens, longest, config.block_size, num_groups
    )


def make_speculator(
    config: EngineConfig,
    runner: LoadedRunner,
    draft: Drafter | None,
    costs: StepCosts | None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speculator | None:
    """What proposes drafts for an engine; on rank 0 only. None: the method is none.

    draft: from load_draft. costs: of the runner's steps; without them every step takes all that is proposed.
    """
    options = config.speculative
    if options.method == "none":
        return None
    drafters: list[Drafter] = []
    if options.method == "ngram":
        drafters.append(NgramDrafter(options.prompt_lookup_min, options.prompt_lookup_max))
    elif options.method == "suffix":
        drafters.append(SuffixDrafter(options))
    elif draft is not None:
        if options.draft_model_lookup_min:
            drafters.append(SuffixDrafter(options, options.draft_model_lookup_min))
        drafters.append(draft)
    if runner.grammars is not None:
        forced = ForcedTokens(runner.grammars)
        drafters = [forced, *(WithinGrammar(drafter, forced) for drafter in drafters)]
    return Speculator(options, drafters, costs, clock) if drafters else None
