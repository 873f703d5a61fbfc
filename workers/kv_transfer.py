"""Moves KV blocks between a rank's paged cache and its fragment store.

A fragment is one block x one group of layers x one KV head, [layer][K|V][slot][head_dim], or what workers.kv_codec
makes of it; a rank moves the heads and the layers that it owns, whatever the tp and pp of the other side. Knows nothing
of requests.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvstore.names import fragment_key
from kvstore.store import FragmentStore
from kvstore.tiers import Fragment
from workers.kv_blocks import FragmentBytes, block_memory
from workers.step import BlockTransfer


@dataclass(frozen=True, slots=True)
class FragmentGrid:
    """Which heads and layers of the whole model a rank owns."""

    first_layer: int
    num_layers: int
    layers_per_fragment: int  # divides first_layer and num_layers
    first_kv_head: int
    num_kv_heads: int

    def keys(self, block_name: bytes) -> list[bytes]:
        """Keys of this rank's fragments of a block: layer groups, and heads within a group."""
        return [
            fragment_key(block_name, first_layer, self.layers_per_fragment, self.first_kv_head + head)
            for first_layer in range(self.first_layer, self.first_layer + self.num_layers, self.layers_per_fragment)
            for head in range(self.num_kv_heads)
        ]


log = logging.getLogger(__name__)

MAX_WAITING_WRITE_BACKS = 64  # batches; tiers that are slower than decoding lose the rest, not tokens


class KVTransfer:
    """Loads and stores blocks of one rank's cache [layers, blocks, kv_heads, 2, block_size, head_dim]."""

    def __init__(self, cache: Tensor, grid: FragmentGrid, store: FragmentStore, encoding: str = "none") -> None:
        """encoding: one of KV_ENCODINGS, what the fingerprint in the blocks' names says."""
        self._memory = block_memory(cache, grid.layers_per_fragment, encoding)
        self._grid = grid
        self._store = store
        self.num_dropped_write_backs = 0  # blocks
        self.on_written_back: Callable[[list[bytes]], None] = lambda names: None  # from a thread of this object's own
        self._write_backs: queue.Queue[tuple[Sequence[bytes], Callable[[], list[FragmentBytes]]] | None]
        self._write_backs = queue.Queue(MAX_WAITING_WRITE_BACKS)
        self._writer = threading.Thread(target=self._write, name="kv-write-back", daemon=True)
        self._writer.start()

    def load(self, transfer: BlockTransfer) -> int:
        """Pull blocks into the cache; returns how many are whole and verified, counted from the first."""
        keys = self._keys(transfer.block_names)
        filling = self._memory.fill(transfer)
        count = _num_whole(self._store.pull(keys, filling.fragments), len(transfer.block_names))
        filling.finish(count)
        return count

    def prepare(self, transfer: BlockTransfer) -> None:
        """A save of these blocks follows when they are computed."""
        self._store.prepare(self._keys(transfer.block_names))

    def save(self, transfer: BlockTransfer) -> int:
        """Publish blocks from the cache; returns how many are stored whole, counted from the first."""
        return self._put(transfer.block_names, self._memory.fragments(transfer))

    def write_back(self, transfer: BlockTransfer) -> None:
        """Publish blocks when there is time: they are copied now, a thread puts them into the tiers.

        Nobody waits for them, so a tier that cannot keep up costs cache hits and never a token.
        """
        if self._write_backs.full():  # before the copy, which is what costs the step
            self.num_dropped_write_backs += len(transfer.block_names)
        else:
            self._write_backs.put((transfer.block_names, self._memory.copies(transfer)))

    def close(self) -> None:
        """Publish what waits, and let the thread go."""
        self._write_backs.put(None)
        self._writer.join()

    def _write(self) -> None:
        while (waiting := self._write_backs.get()) is not None:
            names, copied = waiting
            try:
                count = self._put(names, copied())
            except Exception:  # a tier does not raise; if one does, later blocks are written all the same
                log.exception("blocks were not written back")
                continue
            if count:
                self.on_written_back(list(names[:count]))

    def _put(self, names: Sequence[bytes], fragments: Sequence[FragmentBytes]) -> int:
        """How many of the blocks are stored whole, counted from the first."""
        keyed = [Fragment(key, payload) for key, payload in zip(self._keys(names), fragments, strict=True)]
        return _num_whole(self._store.put(keyed), len(names))

    def _keys(self, names: Sequence[bytes]) -> list[bytes]:
        return [key for name in names for key in self._grid.keys(name)]


def _num_whole(is_there: Sequence[bool], num_blocks: int) -> int:
    """How many blocks have all their fragments, counted from the first."""
    per_block = len(is_there) // max(1, num_blocks)
    first_missing = is_there.index(False) if False in is_there else len(is_there)
    return first_missing // max(1, per_block)
