"""Attention of one sequence to keys that lie in several forms, each of which stands for other distances: in torch.

A token sees each key once, in the form that the key's distance asks for: what is near exactly, what is far in fewer
bits. So a token's result does not depend on how its prompt was cut into chunks, nor on when a block was packed.
Knows nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from costs.packed_kv import PackedBits
from kernels.attention.paged import KEY_TILE, QUERY_TILE, Softmax, TileSums, seen_bias, softmax_attention
from kernels.jit import cdiv
from kernels.kv.packed_blocks import ChannelScales, Packed, unpack_blocks

_QUERY_ROWS = 64


@dataclass(frozen=True, slots=True)
class Reach:
    """Which keys a form stands for: those at distances nearest .. farthest - 1, a token's distance to itself being 0.
    The first tokens of a sequence may be an exception, which another form stands for at any distance."""

    nearest: int = 0
    farthest: int = 0  # 0: there is no end
    first_key: int = 0
    end_key: int = 0  # 0: there is no end

    def is_seen(self, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[positions, keys]"""
        distances = positions[:, None] - keys
        seen = (distances >= self.nearest) & (keys >= self.first_key)
        if self.farthest:
            seen &= distances < self.farthest
        return seen & (keys < self.end_key) if self.end_key else seen

    def keys_of(self, first_position: int, end_position: int) -> range:
        """What tokens of these positions see, at most."""
        first = max(self.first_key, first_position + 1 - self.farthest if self.farthest else 0)
        end = max(0, end_position - self.nearest)
        return range(first, min(end, self.end_key) if self.end_key else end)


@dataclass(frozen=True, slots=True)
class SeenKeys:
    """What one form has of a sequence."""

    kv: torch.Tensor  # [kv_heads, 2, keys, head_dim]
    first_key: int
    reach: Reach

    @property
    def keys(self) -> torch.Tensor:
        """Positions."""
        return torch.arange(self.first_key, self.first_key + self.kv.shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class LevelBlocks:
    """One form of a layer's blocks."""

    parts: tuple[torch.Tensor, ...]  # (kv_cache,), or those of kernels.kv.packed_blocks; of all blocks
    bits: PackedBits | None  # None: exact
    reach: Reach
    block_table: torch.Tensor  # int32 [batch, max_blocks]; entries out of reach are not read
    channels: ChannelScales | None = None  # of packed numbers

    @property
    def packed(self) -> Packed:
        """The parts, where bits are given."""
        return _as_packed(self.parts)

    @property
    def block_size(self) -> int:
        return self.parts[0].shape[3]

    def seen(self, sequence: int, first_position: int, length: int, softmax: Softmax, dtype: torch.dtype) -> SeenKeys:
        """What the tokens of a sequence from a position on see."""
        keys = self.reach.keys_of(first_position, length)
        first, size = max(keys.start, softmax.first_key(first_position)), self.block_size
        stop = max(first, keys.stop)
        first_block = first // size
        block_ids = self.block_table[sequence, first_block : cdiv(stop, size)].long()
        picked = tuple(part[block_ids] for part in self.parts)
        kv = picked[0]
        if self.bits is not None:
            kv = unpack_blocks(_as_packed(picked), self.bits, dtype, self.channels)
        by_token = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)
        return SeenKeys(by_token[:, :, first - first_block * size : stop - first_block * size], first, self.reach)


def _as_packed(parts: tuple[torch.Tensor, ...]) -> Packed:
    key_codes, key_scales, value_codes, value_scales = parts
    return key_codes, key_scales, value_codes, value_scales


def attend_levels(
    q: torch.Tensor, levels: Sequence[SeenKeys], length: int, softmax: Softmax, batch_invariant: bool = False
) -> torch.Tensor:
    """q [n, q_heads, head_dim] are the last tokens of a sequence of this length -> the same shape."""
    if batch_invariant:
        return _attend_in_fixed_order(q, levels, length, softmax)
    n, num_q_heads, head_dim = q.shape
    kv = torch.cat([level.kv for level in levels], 2)
    num_kv_heads = kv.shape[0]
    rows = q.view(n, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k, v = (kv[:, i : i + 1].expand(-1, rows.shape[1], -1, -1) for i in range(2))
    out = torch.empty(n, num_kv_heads, rows.shape[1], head_dim, dtype=q.dtype)
    for begin in range(0, n, _QUERY_ROWS):
        end = min(begin + _QUERY_ROWS, n)
        positions = torch.arange(length - n + begin, length - n + end)
        mask = torch.cat([_seen(level, positions, level.keys, softmax) for level in levels], 1)
        bias = seen_bias(mask, q.dtype)
        attended = softmax_attention(rows[:, :, begin:end], k, v, bias, softmax, (num_kv_heads, -1, 1, 1))
        out[begin:end] = attended.permute(2, 0, 1, 3)
    return out.view(n, num_q_heads, head_dim)


def define_levels(q: torch.Tensor, levels: Sequence[SeenKeys], length: int, softmax: Softmax) -> torch.Tensor:
    """The definition, in float64: one softmax over all keys, each in the form in which it is seen."""
    out, first_position = torch.empty_like(q), length - len(q)
    num_kv_heads = levels[0].kv.shape[0]
    positions, group = torch.arange(first_position, length), q.shape[1] // num_kv_heads
    for h in range(num_kv_heads):
        heads, scores, values = slice(h * group, (h + 1) * group), list[torch.Tensor](), list[torch.Tensor]()
        for level in levels:
            products = torch.einsum("qhd,kd->hqk", q[:, heads].double(), level.kv[h, 0].double())
            unseen = ~_seen(level, positions, level.keys, softmax)
            scores.append(softmax.scores(products).masked_fill(unseen, float("-inf")))
            values.append(level.kv[h, 1].double())
        num_keys = sum(len(value) for value in values)
        if softmax.sinks is not None:
            scores.append(softmax.sinks[heads, None, None].double().expand(-1, len(q), 1))
        weights = torch.softmax(torch.cat(scores, -1), dim=-1)[..., :num_keys]
        out[:, heads] = torch.einsum("hqk,kd->qhd", weights, torch.cat(values)).to(q.dtype)
    return out


def _seen(level: SeenKeys, positions: torch.Tensor, keys: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    return softmax.is_seen(positions, keys) & level.reach.is_seen(positions, keys)


def _attend_in_fixed_order(q: torch.Tensor, levels: Sequence[SeenKeys], length: int, softmax: Softmax) -> torch.Tensor:
    """As kernels.attention.paged.attend_in_fixed_order, with each tile of keys in every form, one after the other."""
    n, num_q_heads, head_dim = q.shape
    num_kv_heads, group = levels[0].kv.shape[0], num_q_heads // levels[0].kv.shape[0]
    num_tiles = cdiv(length, KEY_TILE)
    tiles = [_tiles(level, num_tiles) for level in levels]
    first_position = length - n
    out = torch.empty(q.shape, dtype=q.dtype)
    lane = torch.arange(KEY_TILE)
    for begin in range(first_position // QUERY_TILE * QUERY_TILE, length, QUERY_TILE):
        first, last = max(begin, first_position), min(begin + QUERY_TILE, length)
        rows = torch.zeros(QUERY_TILE, num_kv_heads, group, head_dim)
        mine = slice(first - begin, last - begin)
        rows[mine] = q[first - first_position : last - first_position].unflatten(1, (num_kv_heads, group)).float()
        sums = TileSums.start(rows.transpose(0, 1).reshape(num_kv_heads, QUERY_TILE * group, head_dim), softmax)
        positions = torch.arange(begin, begin + QUERY_TILE).repeat_interleave(group)
        for i in range(cdiv(last, KEY_TILE)):
            for level, its_tiles in zip(levels, tiles, strict=True):
                k, v = its_tiles[i]
                sums.add(k, v, _seen(level, positions, i * KEY_TILE + lane, softmax))
        attended = sums.result().view(num_kv_heads, QUERY_TILE, group, head_dim).transpose(0, 1)
        out[first - first_position : last - first_position] = attended[mine].flatten(1, 2).to(q.dtype)
    return out


def _tiles(level: SeenKeys, num_tiles: int) -> torch.Tensor:
    """[tile, 2, kv_heads, KEY_TILE, head_dim]; zeros where the form has nothing."""
    num_kv_heads, _, num_keys, head_dim = level.kv.shape
    padded = torch.zeros(num_kv_heads, 2, num_tiles * KEY_TILE, head_dim)
    padded[:, :, level.first_key : level.first_key + num_keys] = level.kv
    return padded.view(num_kv_heads, 2, num_tiles, KEY_TILE, head_dim).permute(2, 1, 0, 3, 4).contiguous()
