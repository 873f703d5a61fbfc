"""Decode attention on a CPU: few calls of torch's attention, each for sequences of similar length.

What follows from block tables and lengths alone is in a plan, which all layers of a step can share. Knows nothing of
Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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

Ints = npt.NDArray[np.integer]

# A part of the batch gets a call of its own when that saves padding by more than this many cache elements. A call
# costs some 0.05 ms, a gathered and attended element 0.5 to 1 ns.
_ELEMENTS_WORTH_A_CALL = 1 << 16


@dataclass(frozen=True, slots=True)
class _Part:
    """Sequences of similar length, for one call of torch's attention."""

    members: torch.Tensor | None  # int64: which; None: all, in their order
    num_sequences: int
    rows: torch.Tensor  # as in gather_rows
    reach: slice  # of the gathered tokens of each sequence, those that are attended to
    foreign: torch.Tensor | None  # int64 rows of the gathered [sequences * 2 * kv_heads * tokens]: count as zeros
    bias: torch.Tensor | None  # [sequences, 1, 1, tokens], added to scores; None: all are seen


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Which tokens of the cache the sequences of a step read, and in which calls."""

    parts: tuple[_Part, ...]  # some sequences without tokens are in none

    @staticmethod
    def of(
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        kv_cache: torch.Tensor,
        dtype: torch.dtype,
        window: int = 0,
    ) -> DecodePlan:
        """kv_cache: any layer's; its shape counts. dtype: of q. window: as in Softmax."""
        spans = _Spans.of(seq_lens.numpy(), kv_cache.shape[3], window)
        return DecodePlan(tuple(_parts(spans, block_table.numpy(), kv_cache, dtype)))


@dataclass(frozen=True, slots=True)
class _Spans:
    """Of each sequence, what it reads: tokens from `begin` to `end`, counted from its block of that number."""

    first_block: Ints
    begin: Ints
    end: Ints

    @staticmethod
    def of(lengths: Ints, block_size: int, window: int) -> _Spans:
        first_key = np.maximum(0, lengths - window) if window else np.zeros_like(lengths)
        first_block = first_key // block_size
        return _Spans(first_block, first_key % block_size, lengths - block_size * first_block)

    def of_group(self, group: list[int]) -> _Spans:
        """Some of the sequences; each field as a column."""
        return _Spans(self.first_block[group, None], self.begin[group, None], self.end[group, None])


def _parts(spans: _Spans, block_table: Ints, kv_cache: torch.Tensor, dtype: torch.dtype) -> Iterator[_Part]:
    _, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    groups = similar_lengths(spans.end.tolist(), 2 * num_kv_heads * head_dim)
    for group in groups:
        of = spans.of_group(group)
        last = int(of.end.max())
        if not last:
            continue
        members = None if len(groups) == 1 else torch.tensor(group)
        columns = np.arange(cdiv(last, block_size)) + of.first_block
        table = np.take_along_axis(block_table[group], np.minimum(columns, block_table.shape[1] - 1), 1)
        if (of.begin == of.begin[0]).all() and (of.end == last).all():
            rows = block_rows(torch.from_numpy(table), num_kv_heads)
            yield _Part(members, len(group), rows, slice(int(of.begin[0, 0]), last), None, None)
            continue
        position, is_empty = np.arange(table.shape[1] * block_size), of.end == 0
        is_seen = (position < of.end) & (position >= of.begin) | is_empty & (position == 0)
        bias = seen_bias(torch.from_numpy(is_seen), dtype)[:, None, None]
        # An unused table entry may hold anything: the sequence's own first block is read in its place.
        table = np.where(position[::block_size] < of.end, table, np.where(is_empty, 0, table[:, :1]))
        # A slot outside may hold anything too, even a NaN of another request; weighed with 0 it would stay one.
        read = np.where(position < -(-of.end // block_size) * block_size, position, position % block_size)
        is_foreign = (read < of.begin) | (read >= of.end)
        foreign = _head_rows_of(is_foreign, 2 * num_kv_heads)
        yield _Part(members, len(group), block_rows(torch.from_numpy(table), num_kv_heads), slice(None), foreign, bias)


def _head_rows_of(is_foreign: npt.NDArray[np.bool_], num_heads: int) -> torch.Tensor:
    """is_foreign: [sequences, tokens] -> their rows in [sequences * heads * tokens]."""
    sequence, token = is_foreign.nonzero()
    heads = np.arange(num_heads)[:, None]
    return torch.from_numpy(((sequence * num_heads + heads) * is_foreign.shape[1] + token).reshape(-1))


def attend_decodes(
    q: torch.Tensor, kv_cache: torch.Tensor, plan: DecodePlan, softmax: Softmax, kv_scales: torch.Tensor | None
) -> torch.Tensor:
    """q [sequences, q_heads, head_dim] -> the same shape. softmax: its window is the plan's."""
    out = torch.zeros_like(q)
    for part in plan.parts:
        if part.members is None:
            return _attend_part(q, kv_cache, part, softmax, kv_scales)
        rows = q.index_select(0, part.members)
        out.index_copy_(0, part.members, _attend_part(rows, kv_cache, part, softmax, kv_scales))
    return out


def _attend_part(
    q: torch.Tensor, kv_cache: torch.Tensor, part: _Part, softmax: Softmax, kv_scales: torch.Tensor | None
) -> torch.Tensor:
    num_kv_heads, head_dim = kv_cache.shape[1], kv_cache.shape[4]
    kv = gather_rows(kv_cache, part.rows, part.num_sequences, kv_scales, q.dtype)
    if part.foreign is not None:
        kv.view(-1, head_dim).index_fill_(0, part.foreign, 0)
    k, v = kv[:, :, :, part.reach].unbind(2)
    # The group's heads are query rows: K and V are read once.
    rows = q.reshape(part.num_sequences, num_kv_heads, -1, head_dim)
    out = softmax_attention(rows, k, v, part.bias, softmax, (num_kv_heads, -1, 1))
    return out.reshape(q.shape)


def attend_decodes_in_fixed_order(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax: Softmax,
    kv_scales: torch.Tensor | None,
) -> torch.Tensor:
    """As attend_decodes, in batch-invariant mode: one sequence at a time."""
    out = torch.zeros_like(q)
    for i, length in enumerate(seq_lens.tolist()):
        if length:
            kv = gather_sequence(kv_cache, block_table[i], length, kv_scales, softmax.first_key(length - 1))
            out[i : i + 1] = attend_in_fixed_order(q[i : i + 1], kv, length, softmax)
    return out


def similar_lengths(lengths: list[int], elements_per_token: int) -> list[list[int]]:
    """Cut the batch wherever a group's padding would cost more than a call; in a group in the batch's order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = [[]]
    num_tokens = 0  # of the last group
    for i in order:
        padding = len(groups[-1]) * lengths[i] - num_tokens
        if padding * elements_per_token > _ELEMENTS_WORTH_A_CALL:
            groups.append([])
            num_tokens = 0
        groups[-1].append(i)
        num_tokens += lengths[i]
    return [sorted(group) for group in groups]
