"""Splitting the keys of a decode step among programs, and combining what they found.

A share's result is its output divided by its sum of weights, and log2 of that sum. How many shares there can be follows
from shapes, how many there are from lengths read on the device. Two ways to cut: each sequence into shares of its own,
or, balanced, the row of all sequences' tiles into equal pieces. What piece p holds of sequence s is a share of its own
and has slot p + s, which no other pair that meets has, and a sequence's slots lie side by side: sequences and slots
find each other without a plan. Knows nothing of what a share computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, num_sms, tl

MAX_SPLITS = 128
SPLIT_KEYS = 512  # keys of a share in batch-invariant mode
_COMBINED_AT_ONCE = 16


@jit
def shares(
    length: Value, window: Value, num_splits: Value, SPLIT_KEYS: constexpr, WINDOWED: constexpr, BLOCK_N: constexpr
) -> Value:
    """(first, origin, share): split i has the keys from origin + i * share on, but none before `first`."""
    first = length * 0
    if WINDOWED:
        first = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    if SPLIT_KEYS:
        origin, share = first // SPLIT_KEYS * SPLIT_KEYS, first * 0 + SPLIT_KEYS
    else:
        origin, share = first, tl.maximum(tl.cdiv(tl.cdiv(length - first, num_splits), BLOCK_N), 1) * BLOCK_N
    return first, origin, share


@jit
def balanced_share(
    seq_lens_ptr: Value,
    batch: Value,
    window: Value,
    num_pieces: Value,
    WINDOWED: constexpr,
    BLOCK_B: constexpr,
    BLOCK_N: constexpr,
) -> Value:
    """(share, ends): tiles of a piece, and [BLOCK_B] where each sequence's tiles end in the row of all of them."""
    index = tl.arange(0, BLOCK_B)
    length = tl.load(seq_lens_ptr + index, mask=index < batch, other=0)
    if WINDOWED:
        length -= tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(length, BLOCK_N)
    return tl.maximum(tl.cdiv(tl.sum(tiles, 0), num_pieces), 1), tl.cumsum(tiles, 0)


@jit
def tiles_of(ends: Value, seq: Value, BLOCK_B: constexpr) -> Value:
    """(begin, end) of a sequence's tiles in the row of all of them."""
    index = tl.arange(0, BLOCK_B)
    return tl.sum(tl.where(index == seq - 1, ends, 0), 0), tl.sum(tl.where(index == seq, ends, 0), 0)


@jit
def sequence_of_slot(ends: Value, slot: Value, share: Value, BLOCK_B: constexpr) -> Value:
    """The first whose last slot is not before this one; a sequence without tiles has one slot, too, for nothing."""
    last_slot = tl.cdiv(ends, share) - 1 + tl.arange(0, BLOCK_B)
    return tl.sum((last_slot < slot).to(tl.int32), 0)


@jit
def _merge(
    out_ptr: Value,  # [HEAD_DIM]
    part_ptr: Value,  # [shares, HEAD_DIM] fp32
    lse_ptr: Value,  # [shares] fp32
    used: Value,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,
    AT_ONCE: constexpr,
) -> None:
    """AT_ONCE shares at a time, in order: how many there could have been has no part in the result."""
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = used * 0.0 - float("inf")
    total = used * 0.0
    for start in range(0, used, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
        lse = tl.load(lse_ptr + i, mask=i < used, other=float("-inf"))
        part_ptrs = part_ptr + i[:, None] * HEAD_DIM + dims[None, :]
        part = tl.load(part_ptrs, mask=(i < used)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weight = tl.exp2(lse - new_peak)
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        peak = new_peak
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@jit
def _combine_kernel(
    out_ptr: Value,  # [batch, q_heads, HEAD_DIM]
    part_ptr: Value,  # [batch, q_heads, splits, HEAD_DIM] fp32
    lse_ptr: Value,  # [batch, q_heads, splits] fp32
    seq_lens_ptr: Value,
    num_splits: Value,
    window: Value,
    HEAD_DIM: constexpr,
    SPLIT_KEYS: constexpr,
    WINDOWED: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    AT_ONCE: constexpr,
) -> None:
    seq, q_head = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens_ptr + seq)
    _, origin, share = shares(length, window, num_splits, SPLIT_KEYS, WINDOWED, BLOCK_N)
    row = (seq * tl.num_programs(1) + q_head).to(tl.int64)
    first = row * num_splits
    used = tl.cdiv(length - origin, share)
    _merge(
        out_ptr + row * HEAD_DIM, part_ptr + first * HEAD_DIM, lse_ptr + first, used, HEAD_DIM, BLOCK_D, AT_ONCE
    )  # fmt: skip


@jit
def _combine_balanced_kernel(
    out_ptr: Value,  # [batch, q_heads, HEAD_DIM]
    part_ptr: Value,  # [q_heads, num_slots, HEAD_DIM] fp32
    lse_ptr: Value,  # [q_heads, num_slots] fp32
    seq_lens_ptr: Value,
    num_slots: Value,
    window: Value,
    HEAD_DIM: constexpr,
    WINDOWED: constexpr,
    BLOCK_B: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    AT_ONCE: constexpr,
) -> None:
    seq, q_head = tl.program_id(0), tl.program_id(1)
    share, ends = balanced_share(
        seq_lens_ptr, tl.num_programs(0), window, num_slots - tl.num_programs(0), WINDOWED, BLOCK_B, BLOCK_N
    )  # fmt: skip
    begin, end = tiles_of(ends, seq, BLOCK_B)
    first_piece = begin // share
    used = tl.where(begin < end, (end - 1) // share - first_piece + 1, 0)
    first = q_head.to(tl.int64) * num_slots + first_piece + seq
    row = (seq * tl.num_programs(1) + q_head).to(tl.int64)
    _merge(
        out_ptr + row * HEAD_DIM, part_ptr + first * HEAD_DIM, lse_ptr + first, used, HEAD_DIM, BLOCK_D, AT_ONCE
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Split:
    num_splits: int
    split_keys: int  # 0: whatever makes the shares of a sequence equal
    is_direct: bool  # one share is the result, with nothing to combine

    def empty_parts(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the shares of `out` [batch, heads, head_dim] go, and their sums; `out` itself where it is direct."""
        if self.is_direct:
            return out, None
        batch, num_heads, head_dim = out.shape
        parts = torch.empty(batch, num_heads, self.num_splits, head_dim, dtype=torch.float32, device=out.device)
        return parts, torch.empty(batch, num_heads, self.num_splits, dtype=torch.float32, device=out.device)


def plan_splits(
    q: torch.Tensor,
    programs_per_sm: int,
    num_units: int,
    most_keys: int,
    window: int,
    block_n: int,
    batch_invariant: bool,
) -> Split:
    """num_units: programs there are without splitting. most_keys: capacity of the table."""
    if window:
        most_keys = min(most_keys, window + block_n)  # the first and the last tile may hold fewer
    if batch_invariant:
        return Split(cdiv(most_keys, SPLIT_KEYS) + bool(window), SPLIT_KEYS, is_direct=False)
    wanted = programs_per_sm * num_sms(q) // num_units
    num_splits = max(1, min(wanted, cdiv(most_keys, block_n), MAX_SPLITS))
    return Split(num_splits, 0, is_direct=num_splits == 1)


def combine(
    out: torch.Tensor,
    parts: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    split: Split,
    window: int,
    block_n: int,
) -> None:
    batch, num_heads, head_dim = out.shape
    _combine_kernel[(batch, num_heads)](
        out, parts, lse, seq_lens, split.num_splits, window,
        HEAD_DIM=head_dim, SPLIT_KEYS=split.split_keys, WINDOWED=window > 0, BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)), AT_ONCE=_COMBINED_AT_ONCE, num_warps=4,
    )  # fmt: skip


def num_pieces(
    q: torch.Tensor, programs_per_sm: int, num_kv_heads: int, most_keys: int, window: int, block_n: int
) -> int:
    """For one KV head: twice what fits on the device at once, so that the last are short, but of two tiles at least."""
    most_tiles = cdiv(min(most_keys, window + block_n) if window else most_keys, block_n)
    return max(1, min(2 * programs_per_sm * num_sms(q) // num_kv_heads, q.shape[0] * most_tiles // 2))


def combine_balanced(
    out: torch.Tensor,
    parts: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    block_n: int,
) -> None:
    batch, num_heads, head_dim = out.shape
    _combine_balanced_kernel[(batch, num_heads)](
        out, parts, lse, seq_lens, parts.shape[1], window,
        HEAD_DIM=head_dim, WINDOWED=window > 0, BLOCK_B=next_power_of_2(batch), BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)), AT_ONCE=_COMBINED_AT_ONCE, num_warps=4,
    )  # fmt: skip
