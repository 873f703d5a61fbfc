"""The slots of a node's arena with the disk behind them: what the node process does for its callers.

A fragment that a lookup misses and the disk has is brought into a slot first, so callers only ever see slots. A thread
writes the fragments that are next to be evicted to the disk while they are still in their slots, so that evicting them
costs no copy. Knows nothing of gRPC, sockets or other hosts.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from kvstore.format.fragment import Rejected
from kvstore.tiers.disk.disk import DiskStats, DiskTier
from kvstore.tiers.host.arena import Arena
from kvstore.tiers.host.slot_table import SlotRef, SlotTable

log = logging.getLogger(__name__)

_NUM_READERS = 4
_PROMOTION_S = 1.0  # what a lookup waits for the disk at most: a node that does not answer is worse than a miss
_WRITE_BATCH = 32  # fragments
_LAST_WRITE_S = 5.0
_PAUSE_S = 0.5  # between attempts while the disk takes nothing


@dataclass(frozen=True, slots=True)
class NodeStats:
    """Counters since the process started, and what is there now."""

    num_sealed: int
    num_promoted: int
    """Fragments brought from the disk into slots."""
    num_promotions_late: int
    """Lookups that did not wait for the disk any longer."""
    rejected: Mapping[str, int]
    """Fragments in slots that failed their verification in this process, on their way elsewhere; by reason."""
    disk: DiskStats | None


class NodeSlots:
    """Thread-safe. `writes_through`: every fragment goes to the disk once it is sealed, not only those next to go."""

    def __init__(
        self, arena: Arena, table: SlotTable, disk: DiskTier | None = None, writes_through: bool = False
    ) -> None:
        self.arena = arena
        self._table = table
        self._disk = disk
        self._writes_through = writes_through
        self._lock = threading.Lock()  # of the table and the counters
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._to_write: deque[tuple[bytes, SlotRef]] = deque(maxlen=table.num_slots)
        self._headroom = -(-table.num_slots // 4)  # slots that are kept free, or have their fragment on disk
        self._late: list[Future[None]] = []
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._readers = ThreadPoolExecutor(_NUM_READERS, "kv-disk-read") if disk is not None else None
        self._writer = threading.Thread(target=self._write_ahead, name="kv-disk-write", daemon=True)
        if disk is not None:
            self._writer.start()

    @property
    def disk(self) -> DiskTier | None:
        """The disk behind the arena, where there is one."""
        return self._disk

    def reserve(self, keys: Sequence[bytes]) -> list[SlotRef]:
        """As SlotTable.reserve; the slots' contents are void from here on."""
        with self._lock:
            refs = self._table.reserve(keys)
            for ref in refs:
                if ref.slot >= 0:
                    # Before the writer starts: a reader of the slot's former content finds out at once.
                    self.arena.reserve(ref.slot, ref.generation)
        return refs

    def seal(self, keys: Sequence[bytes], refs: Sequence[SlotRef]) -> int:
        """As SlotTable.seal."""
        with self._lock:
            num_sealed = self._table.seal(keys, refs)
            if self._writes_through:
                self._to_write.extend(zip(keys, refs, strict=True))
        if self._disk is not None:
            self._wake.set()
        return num_sealed

    def lookup(self, keys: Sequence[bytes]) -> list[SlotRef]:
        """As SlotTable.lookup, after the disk was asked for what is missing."""
        with self._lock:
            refs = self._table.lookup(keys)
        missing = [key for key, ref in zip(keys, refs, strict=True) if ref.slot < 0]
        if self._disk is None or not missing or not self._promote(missing):
            return refs
        with self._lock:
            return self._table.lookup(keys)

    def drop(self, keys: Sequence[bytes], generations: Sequence[int]) -> int:
        """As SlotTable.drop."""
        with self._lock:
            return self._table.drop(keys, generations)

    def view(self, key: bytes, ref: SlotRef) -> memoryview | Rejected:
        """Header and payload as they lie in the slot, the header's fields verified; a slot with bad ones is freed."""
        view = self.arena.sealed_view(ref.slot, key, ref.generation)
        if isinstance(view, Rejected):
            self._reject(key, ref, view)
        return view

    def check(self, keys: Sequence[bytes]) -> None:
        """Verifies fragments that a reader found bad, and frees the slots of those that are."""
        with self._lock:
            refs = self._table.lookup(keys)
        for key, ref in zip(keys, refs, strict=True):
            copy = self.arena.read_sealed(ref.slot, key, ref.generation) if ref.slot >= 0 else None
            if isinstance(copy, Rejected):
                self._reject(key, ref, copy)

    def stats(self) -> NodeStats:
        """The counters now."""
        disk = self._disk.stats() if self._disk is not None else None  # before the lock: a disk may hang
        with self._lock:
            return NodeStats(
                num_sealed=self._table.num_sealed,
                num_promoted=self._counts["promoted"],
                num_promotions_late=self._counts["late"],
                rejected=dict(self._rejected),
                disk=disk,
            )

    def close(self) -> None:
        """Ends the threads, then the disk tier."""
        self._closed.set()
        self._wake.set()
        if self._disk is not None and self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)
            self._writer.join(_LAST_WRITE_S)
            if self._writer.is_alive():
                log.warning("the disk hangs: left as it is")
            else:
                self._disk.close()

    def _reject(self, key: bytes, ref: SlotRef, rejected: Rejected) -> None:
        """Frees the slot and counts it, unless it was given away meanwhile: then nothing is wrong with it."""
        with self._lock:
            if self._table.drop([key], [ref.generation]):
                self._rejected[rejected.reason] += 1

    # -- from the disk

    def _promote(self, missing: Sequence[bytes]) -> bool:
        """Brings what the disk has into slots; whether anything may have come."""
        assert self._disk is not None
        assert self._readers is not None
        wanted = [key for key in dict.fromkeys(missing) if self._disk.has(key)]
        wanted = wanted[: max(1, self._table.num_slots // 2)]  # more would push each other out
        self._late = [read for read in self._late if not read.done()]
        if not wanted or len(self._late) >= _NUM_READERS:  # the disk hangs: no call waits for it again
            return False
        reads = [self._readers.submit(self._promote_one, key) for key in wanted]
        done, not_done = wait(reads, timeout=_PROMOTION_S)
        for read in done:
            read.result()  # raises what must not happen
        if not_done:
            self._late += [read for read in not_done if not read.cancel()]
            with self._lock:
                self._counts["late"] += 1
        return True

    def _promote_one(self, key: bytes) -> None:
        assert self._disk is not None
        sealed = self._disk.read(key)
        if sealed is None or isinstance(sealed, Rejected):
            return
        (ref,) = self.reserve([key])
        if ref.slot < 0:
            return
        self.arena.adopt(ref.slot, sealed, ref.generation)
        with self._lock:
            self._counts["promoted"] += self._table.seal([key], [ref])
        self._wake.set()  # others are next to go now

    # -- to the disk

    def _write_ahead(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._wake.clear()
            due = self._due()
            while due and not self._closed.is_set():
                if self._write(due[:_WRITE_BATCH]):
                    due = due[_WRITE_BATCH:]
                    continue
                with self._lock:
                    if self._writes_through:
                        self._to_write.extendleft(reversed(due))
                self._closed.wait(_PAUSE_S)
                self._wake.set()  # what is due is asked anew: some of it may have gone
                break

    def _due(self) -> list[tuple[bytes, SlotRef]]:
        assert self._disk is not None
        with self._lock:
            due = self._table.oldest(self._headroom - self._table.num_free)
            while self._to_write:
                due.append(self._to_write.popleft())
        return [(key, ref) for key, ref in due if not self._disk.has(key)]

    def _write(self, due: Sequence[tuple[bytes, SlotRef]]) -> bool:
        """Whether the disk took what is still there and good."""
        assert self._disk is not None
        copies: list[memoryview] = []
        for key, ref in due:
            copy = self.arena.read_sealed(ref.slot, key, ref.generation)
            if not isinstance(copy, Rejected):
                copies.append(copy)
            else:
                self._reject(key, ref, copy)
        return not copies or self._disk.write(copies) > 0
