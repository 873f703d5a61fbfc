"""Attention over a paged cache in plain torch: the gathers, the definition, and two ways to compute it on a CPU.

`define` is the definition, in float64. `softmax_attention` is fast. `attend_in_fixed_order` gives a token the same
bits whatever is computed beside it. Knows nothing of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from kernels.jit import cdiv

# The fixed order: a tile of queries is that of these positions, whichever of them a call brings, and a tile of keys
# likewise. All products then have one shape, and a token is always the same row of them: the matrix library has no
# choice left that could depend on the batch. Small enough that a decode step, one token of a tile, stays bearable.
QUERY_TILE, KEY_TILE = 4, 128


@dataclass(frozen=True, slots=True)
class Softmax:
    """How scores become weights."""

    scale: float
    window: int = 0  # a token sees this many positions, its own included; 0: all before it
    sinks: torch.Tensor | None = None  # fp32 [q_heads]: a logit that takes weight and brings no value
    soft_cap: float = 0.0  # scores become soft_cap * tanh(score / soft_cap); 0: they stay

    def first_key(self, position: int) -> int:
        return max(0, position + 1 - self.window) if self.window else 0

    def is_seen(self, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[positions, keys]"""
        seen = keys <= positions[:, None]
        return seen & (keys > positions[:, None] - self.window) if self.window else seen

    def scores(self, products: torch.Tensor) -> torch.Tensor:
        scores = products * self.scale
        return torch.tanh(scores / self.soft_cap) * self.soft_cap if self.soft_cap else scores


@cache
def _head_rows(num_rows: int) -> torch.Tensor:
    return torch.arange(num_rows, dtype=torch.int32).unsqueeze(1)


def block_rows(block_table: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """A [batch, blocks] table as what gather_rows reads: [batch * kv_heads * 2 * blocks], in this order."""
    heads = _head_rows(2 * num_kv_heads)
    return torch.add(heads, block_table.unsqueeze(1), alpha=2 * num_kv_heads).view(-1)


def gather_rows(
    kv_cache: torch.Tensor, rows: torch.Tensor, batch: int, kv_scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """[batch, kv_heads, 2, tokens, head_dim] of the cache, in one copy. rows: one head's K or V of one block each, as
    block_rows counts them."""
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    picked = kv_cache.view(num_blocks * 2 * num_kv_heads, block_size * head_dim).index_select(0, rows)
    kv = picked.view(batch, num_kv_heads, 2, -1, head_dim)
    if dtype != kv.dtype:
        kv = kv.to(dtype)
    if kv_scales is None:
        return kv
    if is_per_head(kv_scales):
        return kv.mul_(kv_scales[:, :, None, None])
    scales = kv_scales.view(num_blocks * 2 * num_kv_heads, block_size).index_select(0, rows)
    return kv.mul_(scales.view(batch, num_kv_heads, 2, -1, 1))


def gather_blocks(
    kv_cache: torch.Tensor, block_table: torch.Tensor, kv_scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The blocks of a [batch, blocks] table as [batch, kv_heads, 2, tokens, head_dim]."""
    rows = block_rows(block_table, kv_cache.shape[1])
    return gather_rows(kv_cache, rows, block_table.shape[0], kv_scales, dtype)


def is_per_head(kv_scales: torch.Tensor) -> bool:
    """[kv_heads, 2], not [blocks, kv_heads, 2, block_size]."""
    return kv_scales.dim() == 2


def kv_token_bytes(kv_cache: torch.Tensor, kv_scales: torch.Tensor | None) -> int:
    """Of one token under one KV head: K, V and, if they have scales of their own, those."""
    num_bytes = 2 * kv_cache.shape[-1] * kv_cache.element_size()
    return num_bytes if kv_scales is None or is_per_head(kv_scales) else num_bytes + 2 * kv_scales.element_size()


def gather_sequence(
    kv_cache: torch.Tensor,
    table_row: torch.Tensor,
    length: int,
    kv_scales: torch.Tensor | None = None,
    first_key: int = 0,
) -> torch.Tensor:
    """One sequence's [kv_heads, 2, length - first_key, head_dim], on the CPU or not; in float64 if it has scales."""
    block_size = kv_cache.shape[3]
    first_block = first_key // block_size
    index = table_row[first_block : cdiv(length, block_size)].long()
    blocks = kv_cache[index]
    if kv_scales is not None:
        scales = kv_scales[:, :, None] if is_per_head(kv_scales) else kv_scales[index]
        blocks = blocks.double() * scales.double().unsqueeze(-1)
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[
        :, :, first_key - first_block * block_size : length - first_block * block_size
    ]


def define(q: torch.Tensor, kv: torch.Tensor, softmax: Softmax, seen: torch.Tensor | None = None) -> torch.Tensor:
    """q [n, q_heads, head_dim] are a sequence's last tokens, kv [kv_heads, 2, length, head_dim] what they see of it.

    seen: bool [n, length], where that is not all before a token and itself, cut to the window.
    """
    out = torch.empty_like(q)
    num_kv_heads, _, length, _ = kv.shape
    group = q.shape[1] // num_kv_heads
    keys = torch.arange(length, device=q.device)
    unseen = ~(softmax.is_seen(keys[length - len(q) :], keys) if seen is None else seen)
    for h, (k, v) in enumerate(kv):
        heads = slice(h * group, (h + 1) * group)
        scores = softmax.scores(torch.einsum("qhd,kd->hqk", q[:, heads].double(), k.double()))
        scores.masked_fill_(unseen, float("-inf"))
        if softmax.sinks is not None:
            sinks = softmax.sinks[heads, None, None].double().expand(-1, len(q), 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :length]
        out[:, heads] = torch.einsum("hqk,kd->qhd", weights, v.double()).to(q.dtype)
    return out


def seen_bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores: 0 where seen, else -inf. torch would make it of a bool mask in every call."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def softmax_attention(
    rows: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    softmax: Softmax,
    sinks_shape: tuple[int, ...],
) -> torch.Tensor:
    """rows [..., n, head_dim], k and v [..., length, head_dim]; bias, from seen_bias, broadcasts to [..., n, length].

    Sinks in `sinks_shape` broadcast to [..., n, 1].
    """
    if softmax.sinks is None and not softmax.soft_cap:
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=softmax.scale)
    scores = softmax.scores(torch.matmul(rows.float(), k.float().transpose(-1, -2)))
    if bias is not None:
        scores += bias
    if softmax.sinks is not None:
        sinks = softmax.sinks.view(sinks_shape).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[-2]]
    return torch.matmul(weights.to(v.dtype), v)


def attend_in_fixed_order(q: torch.Tensor, kv: torch.Tensor, length: int, softmax: Softmax) -> torch.Tensor:
    """The bits of a token depend on its own q, on the keys that it sees and on the number of threads; on nothing else.

    q [n, q_heads, head_dim] are the last tokens of a sequence of this length, kv [kv_heads, 2, keys, head_dim] what
    they see of it.
    """
    num_kv_heads, _, num_keys, head_dim = kv.shape
    group = q.shape[1] // num_kv_heads
    first_position, first_tile = length - len(q), (length - num_keys) // KEY_TILE
    num_tiles = cdiv(length, KEY_TILE) - first_tile
    padded = torch.zeros(num_kv_heads, 2, num_tiles * KEY_TILE, head_dim)
    begin = length - num_keys - first_tile * KEY_TILE
    padded[:, :, begin : begin + num_keys] = kv
    # [tile, 2, kv_heads, KEY_TILE, head_dim]: each product's operand is contiguous and aligned alike
    tiles = padded.view(num_kv_heads, 2, num_tiles, KEY_TILE, head_dim).permute(2, 1, 0, 3, 4).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    for begin in range(first_position // QUERY_TILE * QUERY_TILE, first_position + len(q), QUERY_TILE):
        first, last = max(begin, first_position), min(begin + QUERY_TILE, first_position + len(q))
        rows = torch.zeros(QUERY_TILE, num_kv_heads, group, head_dim)
        rows[first - begin : last - begin] = q[first - first_position : last - first_position].unflatten(
            1, (num_kv_heads, group)
        )
        rows = rows.transpose(0, 1).reshape(num_kv_heads, QUERY_TILE * group, head_dim)
        position = torch.arange(begin, begin + QUERY_TILE).repeat_interleave(group)
        key_tiles = range(softmax.first_key(first) // KEY_TILE, cdiv(last, KEY_TILE))
        attended = _attend_tile(rows, position, tiles, first_tile, key_tiles, softmax)
        attended = attended.view(num_kv_heads, QUERY_TILE, group, head_dim).transpose(0, 1)
        out[first - first_position : last - first_position] = attended[first - begin : last - begin].flatten(1, 2)
    return out


def _attend_tile(
    rows: torch.Tensor,
    position: torch.Tensor,
    tiles: torch.Tensor,
    first_tile: int,
    key_tiles: range,
    softmax: Softmax,
) -> torch.Tensor:
    """A tile of keys that a row does not see changes no bit of it, so other rows may ask for more tiles."""
    sums = TileSums.start(rows, softmax)
    lane = torch.arange(KEY_TILE)
    for i in key_tiles:
        k, v = tiles[i - first_tile]
        sums.add(k, v, softmax.is_seen(position, i * KEY_TILE + lane))
    return sums.result()


@dataclass(slots=True)
class TileSums:
    """A tile of rows on its way through tiles of keys, which always come in the same order."""

    rows: torch.Tensor  # [kv_heads, rows, head_dim] fp32
    softmax: Softmax
    acc: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor

    @staticmethod
    def start(rows: torch.Tensor, softmax: Softmax) -> TileSums:
        num_kv_heads, num_rows, _ = rows.shape
        peak = torch.full((num_kv_heads, num_rows, 1), float("-inf"))
        total = torch.zeros(num_kv_heads, num_rows, 1)
        if softmax.sinks is not None:
            group = softmax.sinks.shape[0] // num_kv_heads
            peak = softmax.sinks.view(num_kv_heads, 1, group).expand(-1, num_rows // group, -1).reshape(peak.shape)
            total = torch.ones_like(total)
        return TileSums(rows, softmax, torch.zeros_like(rows), peak, total)

    def add(self, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> None:
        """k, v [kv_heads, KEY_TILE, head_dim]; seen [rows, KEY_TILE]."""
        scores = self.softmax.scores(torch.bmm(self.rows, k.transpose(1, 2)))
        scores.masked_fill_(~seen, float("-inf"))
        new_peak = torch.maximum(self.peak, scores.amax(-1, keepdim=True))
        base = new_peak.masked_fill(new_peak == float("-inf"), 0.0)
        weights = torch.exp(scores - base)
        decay = torch.exp(self.peak - base)
        self.total = self.total * decay + weights.sum(-1, keepdim=True)
        self.acc = self.acc * decay + torch.bmm(weights, v)
        self.peak = new_peak

    def result(self) -> torch.Tensor:
        return self.acc / torch.where(self.total > 0, self.total, 1.0)
