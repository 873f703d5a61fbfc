"""Splitting the keys of a decode step among programs, and combining what they found.

A share's result is its output divided by its sum of weights, and log2 of that sum. How many shares there can be follows
from shapes, how many there are from lengths read on the device. Knows nothing of what a share computes.
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
    """AT_ONCE splits at a time, in order: how many there could have been has no part in the result."""
    seq, q_head = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens_ptr + seq)
    _, origin, share = shares(length, window, num_splits, SPLIT_KEYS, WINDOWED, BLOCK_N)
    used = tl.cdiv(length - origin, share)
    head = (seq * tl.num_programs(1) + q_head).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = length * 0.0 - float("inf")
    total = length * 0.0
    for start in range(0, used, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        lse = tl.load(lse_ptr + head * num_splits + split, mask=split < used, other=float("-inf"))
        part_ptrs = part_ptr + (head * num_splits + split)[:, None] * HEAD_DIM + dims[None, :]
        part = tl.load(part_ptrs, mask=(split < used)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weight = tl.exp2(lse - new_peak)
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        peak = new_peak
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


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
    """num_units: programs there are without splitting. most_keys: what the table has room for."""
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
