"""Fragments of a cache whose blocks have several parts, such as numbers and their scales: one part after the other.

What is moved is bytes, as they lie in the cache. Knows nothing of what the parts mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import gather_kv_blocks, scatter_kv_blocks
from workers.engine.step import BlockTransfer
from workers.kv.blocks import Filling, FragmentBytes, runs
from workers.kv.staging import Staging
from workers.model.cache_spec import BlockPart

_NOTHING_BYTES = 8  # stand for a block that is not full yet, where only full ones are written


class PartedBlocks:
    """As BlockMemory, through a buffer; for a cache on a device a pinned one."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        parts: Sequence[BlockPart],
        layers_per_fragment: int,
        full_block_tokens: int = 0,
    ) -> None:
        """tensors: [layers, blocks, kv_heads, planes, slots, width] of each part. full_block_tokens: there is nothing
        in blocks that have fewer; 0: there is."""
        self._full_block_tokens = full_block_tokens
        self._tensors = [tensor.view(torch.uint8) for tensor in tensors]
        self._is_per_token = [part.is_per_token for part in parts]
        self._layers_per_fragment = layers_per_fragment
        num_layers, _, num_heads, *_ = tensors[0].shape
        self._num_groups, self._num_heads = num_layers // layers_per_fragment, num_heads
        self._staging = Staging(tensors[0].device)

    def gather(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """As in BlockMemory."""
        staged: list[Tensor] = []
        for block_ids, num_tokens in runs(transfer) if self._num_groups else ():
            if num_tokens < self._full_block_tokens:
                staged.append(torch.zeros(self._num_fragments(block_ids), _NOTHING_BYTES, dtype=torch.uint8))
                continue
            ids = self._staging.ids(block_ids)
            gathered = [
                gather_kv_blocks(tensor, ids, self._layers_per_fragment, num_slots).flatten(0, 2).flatten(1)
                for tensor, num_slots in zip(self._tensors, self._num_slots(num_tokens), strict=True)
            ]
            staged.append(self._staging.to_host(torch.cat(gathered, 1)))
        wait_for_copies = self._staging.copied()

        def wait() -> list[FragmentBytes]:
            wait_for_copies()
            return [fragment for buffer in staged for fragment in buffer.numpy()]

        return wait

    def fill(self, transfer: BlockTransfer) -> Filling:
        """As in BlockMemory."""
        staged: list[tuple[Sequence[int], int, Tensor]] = []
        for block_ids, num_tokens in runs(transfer) if self._num_groups else ():
            has_content = num_tokens >= self._full_block_tokens
            num_bytes = sum(self._sizes(num_tokens)) if has_content else _NOTHING_BYTES
            buffer = self._staging.empty((self._num_fragments(block_ids), num_bytes))
            staged.append((block_ids, num_tokens, buffer))

        def finish(num_blocks: int) -> None:
            for block_ids, num_tokens, buffer in staged:
                count = min(num_blocks, len(block_ids))
                num_blocks -= count
                if count and num_tokens >= self._full_block_tokens:
                    whole = buffer[: self._num_fragments(block_ids[:count])]
                    self._scatter(self._staging.to_device(whole), block_ids[:count], num_tokens)

        return Filling([fragment for _, _, buffer in staged for fragment in buffer.numpy()], finish)

    def _num_fragments(self, block_ids: Sequence[int]) -> int:
        return len(block_ids) * self._num_groups * self._num_heads

    def _scatter(self, whole: Tensor, block_ids: Sequence[int], num_tokens: int) -> None:
        ids, sizes = self._staging.ids(block_ids), self._sizes(num_tokens)
        by_part = zip(self._tensors, self._num_slots(num_tokens), whole.split(sizes, 1), strict=True)
        for tensor, num_slots, rows in by_part:
            _, _, _, num_planes, _, width = tensor.shape
            shape = (
                len(block_ids), self._num_groups, self._num_heads, self._layers_per_fragment, num_planes, num_slots,
                width,
            )  # fmt: skip
            scatter_kv_blocks(rows.contiguous().view(shape), ids, tensor)

    def _num_slots(self, num_tokens: int) -> list[int]:
        """Of each part, those that a block with so many tokens has in its fragment."""
        return [
            num_tokens if is_per_token else tensor.shape[4]
            for tensor, is_per_token in zip(self._tensors, self._is_per_token, strict=True)
        ]

    def _sizes(self, num_tokens: int) -> list[int]:
        """Bytes of each part in a fragment."""
        return [
            self._layers_per_fragment * tensor.shape[3] * num_slots * tensor.shape[5]
            for tensor, num_slots in zip(self._tensors, self._num_slots(num_tokens), strict=True)
        ]
