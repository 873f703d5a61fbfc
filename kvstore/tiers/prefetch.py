"""Brings blocks that queued requests will pull into the host tier while they wait, from the tiers behind it.

One thread, a few blocks at a time, request by request. What the disk has comes with the look-up in the host tier.
Prefetched blocks that wait in the arena take a quarter of it at most, wherever they came from, so that they evict
neither each other nor all else. The bound is this worker's: other workers of the host have one each. Fragments are
those of all ranks: the host's node serves them all. Knows nothing of requests but their ids and blocks.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.format.fragment import Fragment, Rejected
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.tier import Tier

log = logging.getLogger(__name__)

_BATCH_FRAGMENTS = 64
_BATCH_BYTES = 16 * 1024 * 1024
_SHARE = 4  # one part in so many of the arena's slots
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class PrefetchStats:
    """Counters since the start. What the disk gave is counted by the node process."""

    num_fragments: Mapping[str, int]
    """Fragments brought into the host tier, by the tier that they came from."""
    num_bytes: Mapping[str, int]
    """Their payload bytes."""
    num_useless: int
    """Those of num_fragments whose requests were gone, or took them from elsewhere, before they could use them."""
    rejected: Mapping[str, int]
    """Fragments that failed their verification, by reason."""


@dataclass(eq=False, slots=True)
class _Job:
    names: deque[bytes]
    num_found: int = 0  # fragments that the look-up found: they were in the arena, or the disk gave them
    num_fetched: int = 0  # fragments that came from a slower tier
    is_over: bool = False


class Prefetcher:
    """Thread-safe; nothing waits for it."""

    def __init__(self, host: HostTier, slower: Sequence[Tier], keys_of: Callable[[bytes], Sequence[bytes]]) -> None:
        """slower: in the order in which they are asked. keys_of: keys of all fragments of a block."""
        self._host = host
        self._slower = tuple(slower)
        self._keys_of = keys_of
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}  # in the order in which they came
        self._fragments_per_block = 0  # 0: not known yet
        self._num_fragments: Counter[str] = Counter()
        self._num_bytes: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._num_useless = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-prefetch", daemon=True)
        self._thread.start()

    def add(self, request_id: str, block_names: Sequence[bytes]) -> None:
        """A queued request will pull these blocks; in this order."""
        with self._changed:
            self._jobs[request_id] = _Job(deque(block_names))
            self._changed.notify()

    def release(self, request_id: str, is_used: bool) -> None:
        """The request waits no more; is_used: because it is admitted, and pulls its blocks now."""
        with self._changed:
            job = self._jobs.pop(request_id, None)
            if job is not None:
                job.is_over = True
                job.names.clear()
                self._num_useless += 0 if is_used else job.num_fetched
                self._changed.notify()  # slots for others are free

    def stats(self) -> PrefetchStats:
        """The counters now."""
        with self._changed:
            return PrefetchStats(
                dict(self._num_fragments), dict(self._num_bytes), self._num_useless, dict(self._rejected)
            )

    def close(self) -> None:
        """Ends the thread; the tiers stay open."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._is_closed and (job := self._next()) is None:
                    self._changed.wait()
                if self._is_closed:
                    return
                assert job is not None
                names = [job.names.popleft() for _ in range(min(self._blocks_per_batch(), len(job.names)))]
            try:
                self._fetch(job, names)
            except Exception:  # a tier does not raise; if one does, later requests are served all the same
                log.exception("blocks were not prefetched")
                self._drop(job)

    def _next(self) -> _Job | None:
        """The first with something to do, unless as much waits to be used as there may be."""
        if sum(job.num_found + job.num_fetched for job in self._jobs.values()) >= self._max_ahead():
            return None
        return next((job for job in self._jobs.values() if job.names), None)

    def _max_ahead(self) -> int:
        """Fragments. One while the node was never reached, so that it is still asked."""
        return max(1, self._host.num_slots // _SHARE)

    def _blocks_per_batch(self) -> int:
        """One until it is known how many fragments that is."""
        if not self._fragments_per_block:
            return 1
        in_batch = min(_BATCH_FRAGMENTS, _BATCH_BYTES // max(1, self._host.slot_bytes), self._max_ahead())
        return max(1, in_batch // self._fragments_per_block)

    def _drop(self, job: _Job) -> None:
        with self._changed:
            job.names.clear()

    def _fetch(self, job: _Job, names: Sequence[bytes]) -> None:
        keys = [key for name in names for key in self._keys_of(name)]
        self._fragments_per_block = len(keys) // len(names)
        is_there = self._host.has(keys)
        if not self._host.is_up:
            self._drop(job)  # without its node the host tier keeps nothing
            return
        missing = [key for key, is_found in zip(keys, is_there, strict=True) if not is_found]
        with self._changed:
            job.num_found += len(keys) - len(missing)
        for tier in self._slower:
            if not missing or job.is_over:
                return
            missing = self._fetch_from(tier, job, missing)

    def _fetch_from(self, tier: Tier, job: _Job, keys: Sequence[bytes]) -> list[bytes]:
        """Those that this tier has not."""
        found: list[Fragment] = []
        missing: list[bytes] = []
        rejected: Counter[str] = Counter()
        for key, payload in zip(keys, tier.load(keys), strict=True):
            if isinstance(payload, memoryview):
                found.append(Fragment(key, payload))
                continue
            missing.append(key)
            if isinstance(payload, Rejected):
                rejected[payload.reason] += 1
        with self._changed:
            self._rejected.update(rejected)
            if job.is_over:
                return []
        stored = [fragment for fragment, is_stored in zip(found, self._host.store(found), strict=True) if is_stored]
        with self._changed:
            self._num_fragments[tier.name] += len(stored)
            self._num_bytes[tier.name] += sum(fragment.payload.nbytes for fragment in stored)
            job.num_fetched += len(stored)
            self._num_useless += len(stored) if job.is_over else 0
        return missing
