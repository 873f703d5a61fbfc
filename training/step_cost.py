"""What a forward pass of a served model costs on one CPU thread: the engine's own layers over its paged cache.

Processor time, so that other work on the machine counts little. Knows nothing of schedulers and samplers, whose time
comes on top.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from workers.kv.schemes.paged_layer import PagedLayer
from workers.model.batch import Batch, GroupInputs
from workers.model.loader import Checkpoint
from workers.model.registry import load_config
from workers.model.stage import build_stage
from workers.parallel import ParallelGroups, Shard

_CPU = torch.device("cpu")
_BLOCK_SIZE = 16
_RUNS = 60


def forward_ms(directory: Path, num_tokens: int, num_streams: int = 1, context_tokens: int = 512) -> float:
    """Median of a pass over `num_tokens` new tokens of each stream, all of whose logits are wanted; fp32."""
    model = load_config(directory)
    stage = build_stage(model, Checkpoint(directory, torch.float32, _CPU), ParallelGroups(Shard(), _CPU))
    batch = _batch(num_tokens, num_streams, context_tokens)
    num_blocks = batch.groups[0].block_table.numel()
    caches = [
        PagedLayer(0, torch.zeros(num_blocks, spec.num_kv_heads, 2, _BLOCK_SIZE, spec.head_dim))
        for spec in model.cache_specs
    ]
    times = []
    with torch.inference_mode():
        for _ in range(_RUNS):
            began = time.process_time()
            stage.forward(batch, caches, None)
            times.append(time.process_time() - began)
    return 1000 * statistics.median(times)


def _batch(num_tokens: int, num_streams: int, context_tokens: int) -> Batch:
    end = context_tokens + num_tokens
    blocks_each = -(-end // _BLOCK_SIZE)
    table = torch.arange(num_streams * blocks_each, dtype=torch.int32).view(num_streams, blocks_each)
    positions = torch.arange(context_tokens, end)
    slots = torch.cat([positions + stream * blocks_each * _BLOCK_SIZE for stream in range(num_streams)])
    is_decode = num_tokens == 1
    return Batch(
        token_ids=torch.arange(num_streams * num_tokens) % 256,
        positions=positions.repeat(num_streams),
        groups=(GroupInputs(table, slots),),
        num_decodes=num_streams if is_decode else 0,
        seq_lens=torch.full((num_streams,), end, dtype=torch.int32),
        query_start_loc=torch.zeros(1, dtype=torch.int32)
        if is_decode
        else torch.arange(0, (num_streams + 1) * num_tokens, num_tokens, dtype=torch.int32),
        max_query_len=0 if is_decode else num_tokens,
        logit_rows=torch.arange(num_streams * num_tokens),
    )
