"""Decode attention on a CPU: few calls of torch's attention, each for sequences of similar length.

Knows nothing of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels.attention.paged import Softmax, gather_blocks, softmax_attention
from kernels.jit import cdiv

# A part of the batch gets a call of its own when that saves padding by more than this many cache elements. A call
# costs about 0.2 ms, a gathered and attended element about 1 ns.
_ELEMENTS_WORTH_A_CALL = 1 << 18


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    lengths: list[int]  # seq_lens again
    num_skipped: list[int]  # of each sequence, tokens at its beginning that are outside the window
    softmax: Softmax
    kv_scales: torch.Tensor | None

    def cut_to_window(self) -> DecodeBatch:
        """Without the blocks that lie wholly outside the window: no sequence then skips more than a block."""
        block_size = self.kv_cache.shape[3]
        first_keys = [self.softmax.first_key(length - 1) for length in self.lengths]
        first_blocks = [first // block_size for first in first_keys]
        if not any(first_keys):
            return self
        lengths = [n - block_size * first for n, first in zip(self.lengths, first_blocks, strict=True)]
        columns = torch.arange(cdiv(max(lengths), block_size)) + torch.tensor(first_blocks).unsqueeze(1)
        return replace(
            self,
            block_table=self.block_table.gather(1, columns.clamp_(max=self.block_table.shape[1] - 1)),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            lengths=lengths,
            num_skipped=[first % block_size for first in first_keys],
        )

    def attend(self) -> torch.Tensor:
        groups = similar_lengths(self.lengths, 2 * self.kv_cache.shape[1] * self.kv_cache.shape[4])
        if len(groups) == 1:
            return self._attend()
        out = torch.empty_like(self.q)
        for members in groups:
            index = torch.tensor(members)
            part = replace(
                self,
                q=self.q[index],
                block_table=self.block_table[index],
                seq_lens=self.seq_lens[index],
                lengths=[self.lengths[i] for i in members],
                num_skipped=[self.num_skipped[i] for i in members],
            )
            out[index] = part._attend()
        return out

    def _attend(self) -> torch.Tensor:
        if len(set(self.lengths)) > 1 or len(set(self.num_skipped)) > 1:
            return self._attend_padded()
        if not any(self.lengths):
            return torch.zeros_like(self.q)
        return self._attend_equal(self.num_skipped[0], self.lengths[0])

    def _attend_equal(self, skipped: int, length: int) -> torch.Tensor:
        """All sequences are alike: no mask, and what lies outside is cut off."""
        kv = self._gather(self.block_table[:, : cdiv(length, self.kv_cache.shape[3])])
        return self._softmax_attention(kv[:, :, :, skipped:length], None)

    def _attend_padded(self) -> torch.Tensor:
        block_size = self.kv_cache.shape[3]
        num_blocks = cdiv(max(self.lengths), block_size)
        position = torch.arange(num_blocks * block_size, dtype=torch.int32)
        in_reach = position < self.seq_lens.unsqueeze(1)
        # An unused table entry may hold anything, and so may a slot outside the window or behind the end, even a NaN
        # of another request: read block 0 for the first, and let both weigh exactly nothing.
        kv = self._gather(torch.where(in_reach[:, ::block_size], self.block_table[:, :num_blocks], 0))
        for i, length in enumerate(self.lengths):
            kv[i, :, :, length:] = 0
            kv[i, :, :, : self.num_skipped[i]] = 0
        if any(self.num_skipped):
            in_reach &= position >= torch.tensor(self.num_skipped).unsqueeze(1)
        if min(self.lengths) == 0:
            in_reach[:, 0] |= self.seq_lens == 0  # a sequence of no tokens attends to the zeros just written
        return self._softmax_attention(kv, in_reach.view(len(self.lengths), 1, 1, -1))

    def _gather(self, block_table: torch.Tensor) -> torch.Tensor:
        return gather_blocks(self.kv_cache, block_table, self.kv_scales, self.q.dtype)

    def _softmax_attention(self, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, num_q_heads, head_dim = self.q.shape
        num_kv_heads = self.kv_cache.shape[1]
        # The group's heads are query rows: K and V are read once.
        rows = self.q.view(batch, num_kv_heads, -1, head_dim)
        out = softmax_attention(rows, kv[:, :, 0], kv[:, :, 1], mask, self.softmax, (num_kv_heads, -1, 1))
        return out.reshape(batch, num_q_heads, head_dim)


def similar_lengths(lengths: list[int], elements_per_token: int) -> list[list[int]]:
    """Cut the batch, shortest sequence first, wherever a group's padding would cost more than a call."""
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
    return groups
