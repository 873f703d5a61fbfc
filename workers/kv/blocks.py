"""The fragments of a rank's paged cache as arrays in host memory, for tiers to be written from and read into.

A cache in host memory shows its own bytes: nothing is copied before a tier does. One on a device, or one whose
fragments travel in 8 bits, is gathered, encoded, and copied to pinned memory as one, and filled the same way back.
Knows nothing of tiers or names.
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
from workers.config import kv_row_bytes
from workers.engine.step import BlockTransfer
from workers.errors import ModelError
from workers.kv.codec import decode, encode
from workers.kv.staging import Staging

FragmentBytes = npt.NDArray[np.uint8]
"""A fragment's payload in its order: flat, or as it lies in a cache, [layers of the group, K|V, slots, bytes]."""


@dataclass(frozen=True, slots=True)
class Filling:
    """Buffers for the fragments of blocks that are being pulled."""

    fragments: list[FragmentBytes]
    """Block by block, in a block by group of layers, then by head."""
    finish: Callable[[int], None]
    """The first so many blocks are whole: brings them into the cache."""


class BlockMemory(Protocol):
    """Fragments of blocks, block by block, in a block by group of layers, then by head."""

    def gather(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """The blocks as they are now; the call may come from another thread, and waits until they can be read.

        In host memory the cache itself is read, so the blocks must not change meanwhile; not with is_copied.
        """

    def fill(self, transfer: BlockTransfer) -> Filling:
        """Buffers for fragments; until finish() the blocks may hold anything."""


def block_memory(cache: Tensor, layers_per_fragment: int, encoding: str) -> BlockMemory:
    """cache: of a cache group, [layers, blocks, kv_heads, 2, block_size, head_dim]. encoding: of workers.kv.codec."""
    if not len(cache):
        return NoBlocks()
    if cache.device.type == "cpu" and encoding == "none":
        return HostBlocks(cache, layers_per_fragment)
    if cache.shape[3] != 2:
        raise ModelError(f"kv_encoding={encoding} on {cache.device.type}: a latent cache is not moved to the tiers yet")
    return StagedBlocks(cache, layers_per_fragment, encoding)


class NoBlocks:
    """As BlockMemory, of a stage that has no layer of the cache group."""

    def gather(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """As in BlockMemory."""
        return list

    def fill(self, transfer: BlockTransfer) -> Filling:
        """As in BlockMemory."""
        return Filling([], lambda num_blocks: None)


class HostBlocks:
    """As BlockMemory, for a cache in host memory whose bytes travel as they are."""

    def __init__(self, cache: Tensor, layers_per_fragment: int) -> None:
        self._bytes: FragmentBytes = cache.view(torch.uint8).numpy()
        self._groups = [slice(i, i + layers_per_fragment) for i in range(0, len(cache), layers_per_fragment)]

    def _fragments(self, transfer: BlockTransfer) -> list[FragmentBytes]:
        return [
            self._bytes[layers, block_id, head, :, :num_tokens]
            for block_id, num_tokens in zip(transfer.block_ids, transfer.num_tokens, strict=True)
            for layers in self._groups
            for head in range(self._bytes.shape[2])
        ]

    def gather(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """As in BlockMemory."""
        if not transfer.is_copied:
            return lambda: self._fragments(transfer)
        copied = [fragment.copy() for fragment in self._fragments(transfer)]
        return lambda: copied

    def fill(self, transfer: BlockTransfer) -> Filling:
        """As in BlockMemory."""
        return Filling(self._fragments(transfer), lambda num_blocks: None)


class StagedBlocks:
    """As BlockMemory, through a buffer; for a cache on a device a pinned one.

    Gathers and scatters run on the current stream, in the order of the steps. Copies between device and host run on a
    stream of their own, so that a step's tokens do not wait for them.
    """

    def __init__(self, cache: Tensor, layers_per_fragment: int, encoding: str = "none") -> None:
        self._cache = cache
        self._layers_per_fragment = layers_per_fragment
        self._encoding = encoding
        self._staging = Staging(cache.device)

    def gather(self, transfer: BlockTransfer) -> Callable[[], list[FragmentBytes]]:
        """As in BlockMemory."""
        staged: list[Tensor] = []
        for block_ids, num_tokens in runs(transfer):
            gathered = gather_kv_blocks(
                self._cache, self._staging.ids(block_ids), self._layers_per_fragment, num_tokens
            )
            encoded = encode(gathered.flatten(0, 2), self._encoding)
            staged.append(self._staging.to_host(encoded))
        wait_for_copies = self._staging.copied()

        def wait() -> list[FragmentBytes]:
            wait_for_copies()
            return [fragment for buffer in staged for fragment in buffer.numpy()]

        return wait

    def fill(self, transfer: BlockTransfer) -> Filling:
        """As in BlockMemory."""
        staged: list[tuple[Sequence[int], int, Tensor]] = []
        for block_ids, num_tokens in runs(transfer):
            num_fragments = len(block_ids) * self._fragments_per_block
            shape = (num_fragments, self._rows_per_slot * num_tokens * self._row_bytes)
            staged.append((block_ids, num_tokens, self._staging.empty(shape)))

        def finish(num_blocks: int) -> None:
            for block_ids, num_tokens, buffer in staged:
                count = min(num_blocks, len(block_ids))
                num_blocks -= count
                if count:
                    whole = buffer[: count * self._fragments_per_block]
                    self._scatter(self._staging.to_device(whole), block_ids[:count], num_tokens)

        return Filling([fragment for _, _, buffer in staged for fragment in buffer.numpy()], finish)

    @property
    def _fragments_per_block(self) -> int:
        return len(self._cache) // self._layers_per_fragment * self._cache.shape[2]

    @property
    def _rows_per_slot(self) -> int:
        return 2 * self._layers_per_fragment

    @property
    def _row_bytes(self) -> int:
        return kv_row_bytes(self._encoding, self._cache.shape[-1], self._cache.element_size())

    def _scatter(self, encoded: Tensor, block_ids: Sequence[int], num_tokens: int) -> None:
        num_layers, _, num_heads, _, _, head_dim = self._cache.shape
        num_groups = num_layers // self._layers_per_fragment
        rows = decode(encoded, head_dim, self._cache.dtype, self._encoding)
        shape = (len(block_ids), num_groups, num_heads, self._layers_per_fragment, 2, num_tokens, head_dim)
        scatter_kv_blocks(rows.view(shape), self._staging.ids(block_ids), self._cache)


def runs(transfer: BlockTransfer) -> Iterator[tuple[Sequence[int], int]]:
    """(blocks with equally many filled slots, how many); only the last block of a transfer may have fewer."""
    num_full = sum(count == transfer.num_tokens[0] for count in transfer.num_tokens)
    for first, last in ((0, num_full), (num_full, len(transfer.block_ids))):
        if last > first:
            yield transfer.block_ids[first:last], transfer.num_tokens[first]
