"""Moves KV blocks between a rank's paged cache and its fragment store.

A fragment is one block x one group of layers x one KV head, [layer][K|V][slot][head_dim], in the numbers that
workers.kv_codec makes of them; a rank moves the heads and the layers that it owns, whatever the tp and pp of the other
side. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.names import fragment_key
from kvstore.store import FragmentStore
from kvstore.tiers import Fragment
from workers.config import kv_row_bytes
from workers.kv_codec import decode_into, encode
from workers.step import BlockTransfer


@dataclass(frozen=True, slots=True)
class FragmentGrid:
    """Which heads and layers of the whole model a rank owns."""

    first_layer: int
    num_layers: int
    layers_per_fragment: int  # divides first_layer and num_layers
    first_kv_head: int
    num_kv_heads: int

    def layer_groups(self) -> Iterator[tuple[int, slice]]:
        """(first layer in the model, the group's layers in this rank's cache)."""
        for start in range(0, self.num_layers, self.layers_per_fragment):
            yield self.first_layer + start, slice(start, start + self.layers_per_fragment)

    def keys(self, block_name: bytes) -> list[bytes]:
        """Keys of this rank's fragments of a block: layer groups, and heads within a group."""
        return [
            fragment_key(block_name, first_layer, self.layers_per_fragment, self.first_kv_head + head)
            for first_layer, _ in self.layer_groups()
            for head in range(self.num_kv_heads)
        ]


log = logging.getLogger(__name__)

MAX_WAITING_WRITE_BACKS = 64  # batches; tiers that are slower than decoding lose the rest, not tokens


class KVTransfer:
    """Loads and stores blocks of one rank's cache [layers, blocks, kv_heads, 2, block_size, head_dim]."""

    def __init__(self, cache: Tensor, grid: FragmentGrid, store: FragmentStore, compression: str = "none") -> None:
        """compression: one of KV_COMPRESSIONS, what the fingerprint in the blocks' names says."""
        self._cache = cache
        self._compression = compression
        self._grid = grid
        self._store = store
        self.num_layout_rejects = 0  # verified bytes of a length that this rank does not expect
        self.num_dropped_write_backs = 0  # blocks
        self.on_written_back: Callable[[list[bytes]], None] = lambda names: None  # from a thread of this object's own
        self._write_backs: queue.Queue[tuple[Sequence[bytes], list[Fragment]] | None]
        self._write_backs = queue.Queue(MAX_WAITING_WRITE_BACKS)
        self._writer = threading.Thread(target=self._write, name="kv-write-back", daemon=True)
        self._writer.start()

    def load(self, transfer: BlockTransfer) -> int:
        """Pull blocks into the cache; returns how many are whole and verified, counted from the first."""
        keys = [self._grid.keys(name) for name in transfer.block_names]
        found = iter(self._store.get([key for block in keys for key in block]))
        count = 0
        for block_id, num_tokens in zip(transfer.block_ids, transfer.num_tokens, strict=True):
            payloads = [next(found) for _ in keys[0]]
            if not self._fill(block_id, num_tokens, payloads):
                break
            count += 1
        return count

    def _fill(self, block_id: int, num_tokens: int, payloads: Sequence[memoryview | None]) -> bool:
        views = [
            self._cache[layers, block_id, head, :, :num_tokens]
            for _, layers in self._grid.layer_groups()
            for head in range(self._grid.num_kv_heads)
        ]
        for view, payload in zip(views, payloads, strict=True):
            if payload is None:
                return False
            num_rows, head_dim = view.numel() // view.shape[-1], view.shape[-1]
            if len(payload) != num_rows * kv_row_bytes(self._compression, head_dim, view.element_size()):
                self.num_layout_rejects += 1
                return False
        for view, payload in zip(views, payloads, strict=True):
            assert payload is not None
            decode_into(view, payload, self._compression)
        return True

    def save(self, transfer: BlockTransfer) -> int:
        """Publish blocks from the cache; returns how many are stored whole, counted from the first."""
        return self._put(transfer.block_names, self._cut(transfer))

    def write_back(self, transfer: BlockTransfer) -> None:
        """Publish blocks when there is time: they are copied now, a thread puts them into the tiers.

        Nobody waits for them, so a tier that cannot keep up costs cache hits and never a token.
        """
        if self._write_backs.full():  # before the copy, which is what costs the step
            self.num_dropped_write_backs += len(transfer.block_names)
        else:
            self._write_backs.put((transfer.block_names, self._cut(transfer)))

    def close(self) -> None:
        """Publish what waits, and let the thread go."""
        self._write_backs.put(None)
        self._writer.join()

    def _write(self) -> None:
        while (waiting := self._write_backs.get()) is not None:
            names, fragments = waiting
            try:
                count = self._put(names, fragments)
            except Exception:  # a tier does not raise; if one does, later blocks are written all the same
                log.exception("blocks were not written back")
                continue
            if count:
                self.on_written_back(list(names[:count]))

    def _put(self, names: Sequence[bytes], fragments: Sequence[Fragment]) -> int:
        """How many of the blocks are stored whole, counted from the first."""
        stored = self._store.put(fragments)
        per_block = len(fragments) // max(1, len(names))
        count = 0
        while count < len(names) and all(stored[count * per_block : (count + 1) * per_block]):
            count += 1
        return count

    def _cut(self, transfer: BlockTransfer) -> list[Fragment]:
        """The fragments of blocks, copied out of the cache, block by block."""
        if not transfer.block_ids:
            return []
        num_full = sum(n == transfer.num_tokens[0] for n in transfer.num_tokens)  # only the last may differ
        return [
            fragment
            for first, last in ((0, num_full), (num_full, len(transfer.block_ids)))
            if last > first
            for fragment in self._fragments(
                transfer.block_names[first:last], transfer.block_ids[first:last], transfer.num_tokens[first]
            )
        ]

    def _fragments(self, names: Sequence[bytes], block_ids: Sequence[int], num_tokens: int) -> list[Fragment]:
        """Fragments of blocks with equally many filled slots, block by block."""
        index = torch.tensor(block_ids, device=self._cache.device)
        per_group: list[list[memoryview]] = []
        for _, layers in self._grid.layer_groups():
            picked = self._cache[layers, :, :, :, :num_tokens].index_select(
                1, index
            )  # [layers, blocks, heads, 2, n, dim]
            rows = picked.permute(1, 2, 0, 3, 4, 5).flatten(0, 1)  # [blocks x heads, layers, 2, n, dim]
            raw = memoryview(encode(rows, self._compression).cpu().flatten().numpy().data)
            size = len(raw) // (len(block_ids) * self._grid.num_kv_heads)
            per_group.append([raw[i : i + size] for i in range(0, len(raw), size)])
        heads = self._grid.num_kv_heads
        return [
            Fragment(key, payload)
            for b, name in enumerate(names)
            for key, payload in zip(
                self._grid.keys(name),
                (p for group in per_group for p in group[b * heads : (b + 1) * heads]),
                strict=True,
            )
        ]
