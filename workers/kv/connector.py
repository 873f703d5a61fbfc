"""Moves KV blocks between a rank's paged cache and its fragment store, beside the engine's steps.

A step only starts transfers and asks which have ended. Threads of the connector talk to the tiers, so that a slow tier
delays only those that wait for it. On a device a store is gathered, and a load scattered, on the stream that
computes, in the step's own order; in host memory the tiers read and write the cache itself. The blocks of a transfer
are not reused until it has ended on every rank. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvstore.format.fragment import Fragment
from kvstore.store import FragmentStore
from workers.engine.step import BlockTransfer, TransferDone
from workers.errors import StepFailed
from workers.kv.blocks import BlockMemory, FragmentBytes
from workers.kv.grid import FragmentGrid

log = logging.getLogger(__name__)

LOAD_THREADS = 4  # loads of different requests; most of their time they wait for a tier
STORE_THREADS = 2
PENDING = -1
_FORGET_S = 15.0  # more than the time-outs of a tier's calls
"""In place of a number of blocks: the transfer has not ended on this rank."""


class KVConnector:
    """One memory and one grid per cache group.

    start_load and start_store run on the thread that runs steps; finish runs there too, or on the engine's thread when
    the step is through.
    """

    def __init__(self, memories: Sequence[BlockMemory], grids: Sequence[FragmentGrid], store: FragmentStore) -> None:
        self._memories = tuple(memories)
        self._grids = tuple(grids)
        self._store = store
        self._changed = threading.Condition()
        self._moving: set[int] = set()  # transfers that a thread has, or will have
        self._ended: dict[int, int] = {}  # by transfer: blocks that are whole, counted from the first
        self._finishers: dict[int, Callable[[int], None]] = {}
        self._prepared: dict[int, Future[None]] = {}
        self._loaders = ThreadPoolExecutor(LOAD_THREADS, "kv-load")
        self._storers = ThreadPoolExecutor(STORE_THREADS, "kv-store")
        self._write_backs = ThreadPoolExecutor(1, "kv-write-back")  # first tokens do not wait behind them
        self.on_ended: Callable[[], None] = lambda: None
        """Called on a thread of the connector whenever a transfer has ended here."""

    def prepare(self, transfer: BlockTransfer) -> None:
        """A store of these blocks will be started when they are computed."""
        self._prepared[transfer.transfer_id] = self._storers.submit(self._store.prepare, self._keys(transfer))

    def start_load(self, transfer: BlockTransfer) -> None:
        """Pull blocks into the cache."""
        filling = self._memories[transfer.group].fill(transfer)
        self._finishers[transfer.transfer_id] = filling.finish
        self._submit(self._loaders, transfer, lambda: self._store.load(self._keys(transfer), filling.fragments))

    def start_store(self, transfer: BlockTransfer) -> None:
        """Publish blocks as they are in the cache now."""
        gathered = self._memories[transfer.group].gather(transfer)
        prepared = self._prepared.pop(transfer.transfer_id, None)

        def store() -> Sequence[bool]:
            if prepared is not None:
                prepared.result()  # before it ends, its slots are not free for any store, nor for this one
            return self._store_fragments(transfer, gathered())

        self._submit(self._write_backs if transfer.is_copied else self._storers, transfer, store)

    def wait(self, transfers: Sequence[BlockTransfer], timeout_s: float) -> None:
        """Return when these have ended on this rank, or when the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: all(t.transfer_id in self._ended for t in transfers), timeout_s)

    def ended(self) -> list[int]:
        """Transfers that have ended on this rank and were not finished."""
        with self._changed:
            return list(self._ended)

    def poll(self, transfer_id: int) -> int:
        """How many blocks of a transfer are whole, counted from the first; PENDING while it has not ended here."""
        with self._changed:
            return self._ended.get(transfer_id, PENDING)

    def claim(self, done: TransferDone) -> None:
        """The transfer has ended on every rank, which is not to be found out again; finish follows with a step."""
        with self._changed:
            self._ended.pop(done.transfer_id, None)

    def finish(self, done: TransferDone) -> None:
        """The transfer has ended on every rank: brings its blocks into the cache."""
        self.claim(done)
        finisher = self._finishers.pop(done.transfer_id, None)
        if finisher is not None:
            finisher(done.num_blocks)

    def forget(self) -> None:
        """Give up all transfers; returns when none of them touches the cache any more.

        Raises StepFailed when a tier hangs for too long: what such a transfer may still write, nobody can go on with.
        """
        for prepared in self._prepared.values():
            prepared.exception()  # its slots are freed when their reservations expire
        self._prepared.clear()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._moving, _FORGET_S):
                raise StepFailed(f"a step failed, and its transfers do not end within {_FORGET_S:g} s")
            self._ended.clear()
        self._finishers.clear()

    def close(self) -> None:
        """End the transfers that have begun, and let the threads go."""
        self._loaders.shutdown()
        self._write_backs.shutdown()
        self._storers.shutdown()

    def _submit(self, threads: ThreadPoolExecutor, transfer: BlockTransfer, move: Callable[[], Sequence[bool]]) -> None:
        with self._changed:
            self._moving.add(transfer.transfer_id)
        threads.submit(self._run, transfer, move)

    def _run(self, transfer: BlockTransfer, move: Callable[[], Sequence[bool]]) -> None:
        num_blocks = 0
        try:
            num_blocks = _num_whole(move(), len(transfer.block_names))
        except Exception:  # a tier does not raise; if one does, the transfer must end all the same
            log.exception("blocks were not moved")
        with self._changed:
            self._ended[transfer.transfer_id] = num_blocks
            self._moving.discard(transfer.transfer_id)
            self._changed.notify_all()
        self.on_ended()

    def _store_fragments(self, transfer: BlockTransfer, fragments: Sequence[FragmentBytes]) -> Sequence[bool]:
        keyed = [Fragment(key, payload) for key, payload in zip(self._keys(transfer), fragments, strict=True)]
        return self._store.store(keyed)

    def _keys(self, transfer: BlockTransfer) -> list[bytes]:
        grid = self._grids[transfer.group]
        return [key for name in transfer.block_names for key in grid.keys(name)]


def _num_whole(is_there: Sequence[bool], num_blocks: int) -> int:
    """How many blocks have all their fragments, counted from the first. A rank without fragments lacks none."""
    if not is_there:
        return num_blocks
    first_missing = is_there.index(False) if False in is_there else len(is_there)
    return first_missing * num_blocks // len(is_there)
