"""The fragments of a rank's paged cache as arrays in host memory, for tiers to be written from and read into.

A cache in host memory shows its own bytes: nothing is copied before a tier does. One on a device is gathered into
pinned memory by one kernel and one copy, and filled the same way back. Knows nothing of tiers or names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import gather_kv_blocks, scatter_kv_blocks
from workers.step import BlockTransfer

FragmentBytes = npt.NDArray[np.uint8]
"""[layers of the group, K|V, slots, bytes of a token], the last two contiguous; a fragment's payload in its order."""


@dataclass(frozen=True, slots=True)
class Filling:
    """Room for the fragments of blocks that are being pulled."""

    fragments: list[FragmentBytes]
    """Block by block, in a block by group of layers, then by head."""
    finish: Callable[[int], None]
    """The first so many blocks are whole: brings them into the cache."""


class BlockMemory(Protocol):
    """Fragments of blocks, block by block, in a block by group of layers, then by head."""

    def fragments(self, transfer: BlockTransfer) -> list[FragmentBytes]:
        """To be read before the cache changes."""

    def copies(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """Copied as the cache is now; the call waits until they are, and may come from another thread."""

    def fill(self, transfer: BlockTransfer) -> Filling:
        """Room for fragments; until finish() the blocks may hold anything."""


def block_memory(cache: Tensor, layers_per_fragment: int) -> BlockMemory:
    """cache: [layers, blocks, kv_heads, 2, block_size, head_dim]."""
    memory = HostBlocks if cache.device.type == "cpu" else DeviceBlocks
    return memory(cache, layers_per_fragment)


class HostBlocks:
    """As BlockMemory, for a cache in host memory."""

    def __init__(self, cache: Tensor, layers_per_fragment: int) -> None:
        self._bytes: FragmentBytes = cache.view(torch.uint8).numpy()
        self._groups = [slice(i, i + layers_per_fragment) for i in range(0, len(cache), layers_per_fragment)]

    def fragments(self, transfer: BlockTransfer) -> list[FragmentBytes]:
        """As in BlockMemory."""
        return [
            self._bytes[layers, block_id, head, :, :num_tokens]
            for block_id, num_tokens in zip(transfer.block_ids, transfer.num_tokens, strict=True)
            for layers in self._groups
            for head in range(self._bytes.shape[2])
        ]

    def copies(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """As in BlockMemory."""
        copied = [fragment.copy() for fragment in self.fragments(transfer)]
        return lambda: copied

    def fill(self, transfer: BlockTransfer) -> Filling:
        """As in BlockMemory."""
        return Filling(self.fragments(transfer), lambda num_blocks: None)


class DeviceBlocks:
    """As BlockMemory, for a cache on a device: through pinned memory, on the current stream."""

    def __init__(self, cache: Tensor, layers_per_fragment: int) -> None:
        self._cache = cache
        self._layers_per_fragment = layers_per_fragment
        self._is_cuda = cache.is_cuda

    def fragments(self, transfer: BlockTransfer) -> list[FragmentBytes]:
        """As in BlockMemory."""
        return self.copies(transfer)()

    def copies(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """As in BlockMemory."""
        staged = []
        for block_ids, num_tokens in _runs(transfer):
            gathered = gather_kv_blocks(self._cache, self._ids(block_ids), self._layers_per_fragment, num_tokens)
            pinned = torch.empty_like(gathered, device="cpu", pin_memory=self._is_cuda)
            staged.append(pinned.copy_(gathered, non_blocking=True))
        copied = torch.cuda.Event() if self._is_cuda else None
        if copied is not None:
            copied.record()

        def wait() -> list[FragmentBytes]:
            if copied is not None:
                copied.synchronize()
            return [fragment for buffer in staged for fragment in _split(buffer)]

        return wait

    def fill(self, transfer: BlockTransfer) -> Filling:
        """As in BlockMemory."""
        num_layers, _, num_heads, _, _, head_dim = self._cache.shape
        num_groups = num_layers // self._layers_per_fragment
        staged: list[tuple[Sequence[int], Tensor]] = []
        for block_ids, num_tokens in _runs(transfer):
            shape = (len(block_ids), num_groups, num_heads, self._layers_per_fragment, 2, num_tokens, head_dim)
            staged.append((block_ids, torch.empty(shape, dtype=self._cache.dtype, pin_memory=self._is_cuda)))

        def finish(num_blocks: int) -> None:
            for block_ids, buffer in staged:
                count = min(num_blocks, len(block_ids))
                num_blocks -= count
                if count:
                    filled = buffer[:count].to(self._cache.device, non_blocking=True)
                    scatter_kv_blocks(filled, self._ids(block_ids[:count]), self._cache)

        return Filling([fragment for _, buffer in staged for fragment in _split(buffer)], finish)

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(block_ids, dtype=torch.int32, device=self._cache.device)


def _runs(transfer: BlockTransfer) -> Iterator[tuple[Sequence[int], int]]:
    """(blocks with equally many filled slots, how many); only the last block of a transfer may have fewer."""
    num_full = sum(count == transfer.num_tokens[0] for count in transfer.num_tokens)
    for first, last in ((0, num_full), (num_full, len(transfer.block_ids))):
        if last > first:
            yield transfer.block_ids[first:last], transfer.num_tokens[first]


def _split(buffer: Tensor) -> list[FragmentBytes]:
    """The fragments of a gathered buffer, see kernels.kv_copy."""
    as_bytes: FragmentBytes = buffer.view(torch.uint8).numpy()
    return list(as_bytes.reshape(-1, *as_bytes.shape[3:]))
