"""Prefill attention on a CPU: one sequence at a time, in tiles of queries, by torch's attention.

What follows from block tables and lengths alone is in a plan, which all layers of a step can share. Knows nothing of
Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.attention.paged import (
    Softmax,
    attend_in_fixed_order,
    block_rows,
    gather_rows,
    gather_sequence,
    seen_bias,
    softmax_attention,
)
from kernels.jit import cdiv

# Of one call of torch's attention, which computes what its bias leaves out: the rows of a small tile share nearly all
# of their keys.
_QUERY_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some of a chunk's queries."""

    queries: slice
    keys: slice  # of the chunk's
    bias: torch.Tensor | None  # [queries, keys], added to scores; None: all are seen


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A sequence's last tokens. Its biases take as many elements as it has queries times keys."""

    tokens: slice  # of the step's
    rows: torch.Tensor  # as in gather_rows
    reach: slice  # of the gathered tokens, those that a query sees
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Which tokens of the cache the sequences of a step read, and in which calls."""

    chunks: tuple[_Chunk, ...]

    @staticmethod
    def of(
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        kv_cache: torch.Tensor,
        dtype: torch.dtype,
        window: int = 0,
    ) -> PrefillPlan:
        """kv_cache: any layer's; its shape counts. dtype: of q. window: as in Softmax."""
        num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
        softmax, starts = Softmax(1.0, window), query_start_loc.tolist()
        chunks = []
        for i, length in enumerate(seq_lens.tolist()):
            num_queries = starts[i + 1] - starts[i]
            if not num_queries:
                continue
            first_key = softmax.first_key(length - num_queries)
            first_block = first_key // block_size
            rows = block_rows(block_table[i : i + 1, first_block : cdiv(length, block_size)], num_kv_heads)
            reach = slice(first_key - first_block * block_size, length - first_block * block_size)
            tiles = _tiles(num_queries, length, first_key, softmax, dtype)
            chunks.append(_Chunk(slice(starts[i], starts[i + 1]), rows, reach, tiles))
        return PrefillPlan(tuple(chunks))


def _tiles(num_queries: int, length: int, first_key: int, softmax: Softmax, dtype: torch.dtype) -> tuple[_Tile, ...]:
    tiles = []
    for begin in range(0, num_queries, _QUERY_ROWS):
        end = min(begin + _QUERY_ROWS, num_queries)
        first, last = softmax.first_key(length - num_queries + begin), length - num_queries + end
        bias = None
        if end - begin > 1:  # a single query sees all keys from its first one on
            keys = torch.arange(first, last)
            bias = seen_bias(softmax.is_seen(keys[begin - end :], keys), dtype)
        tiles.append(_Tile(slice(begin, end), slice(first - first_key, last - first_key), bias))
    return tuple(tiles)


def attend_prefills(
    q: torch.Tensor, kv_cache: torch.Tensor, plan: PrefillPlan, softmax: Softmax, kv_scales: torch.Tensor | None
) -> torch.Tensor:
    """q [tokens, q_heads, head_dim] -> the same shape. softmax: its window is the plan's."""
    num_kv_heads, head_dim = kv_cache.shape[1], kv_cache.shape[4]
    out = torch.empty(q.shape, dtype=q.dtype)
    for chunk in plan.chunks:
        kv = gather_rows(kv_cache, chunk.rows, 1, kv_scales, q.dtype)[0][:, :, chunk.reach]
        # The KV head is the batch and its group the heads, so that K and V are shared without a copy.
        queries, attended = (t[chunk.tokens].unflatten(1, (num_kv_heads, -1)) for t in (q, out))
        rows = queries.permute(1, 2, 0, 3)
        k, v = (kv[:, i : i + 1].expand(-1, rows.shape[1], -1, head_dim) for i in range(2))
        for tile in chunk.tiles:
            found = softmax_attention(
                rows[:, :, tile.queries], k[:, :, tile.keys], v[:, :, tile.keys], tile.bias, softmax,
                (num_kv_heads, -1, 1, 1),
            )  # fmt: skip
            attended[tile.queries] = found.permute(2, 0, 1, 3)
    return out


def attend_prefills_in_fixed_order(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax: Softmax,
    kv_scales: torch.Tensor | None,
) -> torch.Tensor:
    """As attend_prefills, in batch-invariant mode."""
    starts: list[int] = query_start_loc.tolist()
    out = torch.empty(q.shape, dtype=q.dtype)
    for i, length in enumerate(seq_lens.tolist()):
        rows = q[starts[i] : starts[i + 1]]
        if len(rows):
            first_key = softmax.first_key(length - len(rows))
            kv = gather_sequence(kv_cache, block_table[i], length, kv_scales, first_key)
            out[starts[i] : starts[i + 1]] = attend_in_fixed_order(rows, kv, length, softmax)
    return out
