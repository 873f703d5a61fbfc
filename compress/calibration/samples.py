"""Calibration blocks that the model writes itself, where there is no text: sampled at temperature 1.

All layers are in memory meanwhile, unlike in the rest of a compression.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.calibration.walk import ModelWalk
from workers.model.batch import Batch, GroupInputs

_SEQUENCES_AT_ONCE = 128


@torch.no_grad()
def own_samples(
    walk: ModelWalk, first_token: int, num_blocks: int, num_tokens: int, seed: int, on_token: Callable[[int], None]
) -> Tensor:
    """int64 [blocks, tokens]; each begins with first_token, and the same seed gives the same."""
    generator = torch.Generator().manual_seed(seed)
    layers = [walk.plain_layer(index) for index in range(walk.model.num_hidden_layers)]
    blocks = []
    for begin in range(0, num_blocks, _SEQUENCES_AT_ONCE):
        count = min(_SEQUENCES_AT_ONCE, num_blocks - begin)
        caches = [walk.layer_cache(spec, count, num_tokens) for spec in walk.model.cache_specs]
        ids = torch.full((count, num_tokens), first_token)
        for position in range(num_tokens - 1):
            batch = _step(walk, ids[:, position], position, num_tokens)
            x = walk.embed(batch)
            for layer, cache in zip(layers, caches, strict=True):
                q, residual = layer.before_attention(x, None, batch, cache)
                hidden, residual = layer.after_attention(layer.attention(q, batch, cache), residual)
                x = hidden + residual
            chances = walk.logits_of_rows(x, batch).softmax(-1).cpu()
            ids[:, position + 1] = torch.multinomial(chances, 1, generator=generator)[:, 0]
            on_token(position + 2)
        blocks.append(ids)
    return torch.cat(blocks)


def _step(walk: ModelWalk, token_ids: Tensor, position: int, num_tokens: int) -> Batch:
    """One token of each sequence, each in cache blocks of its own."""
    count, device = len(token_ids), walk.device
    table, slots = walk.places(count, num_tokens)
    return Batch(
        token_ids=token_ids.to(device),
        positions=torch.full((count,), position, device=device),
        groups=(GroupInputs(table, slots[:, position].contiguous()),) * walk.num_cache_groups,
        num_decodes=count,
        seq_lens=torch.full((count,), position + 1, dtype=torch.int32, device=device),
        query_start_loc=torch.zeros(1, dtype=torch.int32, device=device),
        max_query_len=0,
        logit_rows=torch.arange(count, device=device),
    )
