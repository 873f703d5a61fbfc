"""Who is in the cluster and who holds which block: leases of workers with epochs, and locations of published blocks.

`Directory` is the seam; MemoryDirectory is the one without a network, which the node process serves to the others. Its
answers about blocks are hints: a location may have lost a block meanwhile. Pure: the clock is injected. Knows nothing
of fragments, of what a location is, or of who routes where.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

RETIRED = "retired"
DEFAULT_MAX_BLOCKS = 1 << 18
DEFAULT_BLOCK_TTL_S = 3600.0


class DirectoryUnavailable(Exception):
    """The directory cannot be reached: nothing is known, and no epoch advances."""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a worker says about itself."""

    worker_id: str
    """Unique for the life of the worker's process."""
    address: str
    """HOST:PORT of its WorkerService."""
    pool: str
    role: str
    """"prefill", "decode" or "mixed"; "retired" while it takes no requests: routers pass it over."""
    node_id: str
    """KV node of its host."""


@dataclass(frozen=True, slots=True)
class LeasedWorker:
    """A worker whose lease is alive."""

    record: WorkerRecord
    epoch: int
    """Greater for every new registration in the cluster; the same while the lease is renewed in time or held on to."""


class Directory(Protocol):
    """Thread-safe. Every call may raise DirectoryUnavailable."""

    def keep_alive(self, record: WorkerRecord, ttl_s: float, held_epoch: int = 0) -> int:
        """Registers a worker or renews its lease for ttl_s seconds; the lease's epoch.

        held_epoch: of a lease that this worker had, and that it goes on under if the directory has lost it, because it
        was the directory that was away; 0: then it is a new registration. Epochs given later are greater than both.
        """

    def withdraw(self, worker_id: str) -> None:
        """Ends a lease at once; unknown workers are ignored."""

    def workers(self) -> list[LeasedWorker]:
        """Workers with a live lease, by worker_id."""

    def publish(self, block_names: Sequence[bytes], location: str) -> None:
        """Says that a location holds these blocks whole."""

    def locate(self, block_names: Sequence[bytes]) -> list[frozenset[str]]:
        """For each block the locations that hold it."""

    def close(self) -> None:
        """Gives up connections. Leases stay until they end."""


def check_keep_alive(record: WorkerRecord, ttl_s: float) -> None:
    """Raises ValueError for a registration that no directory takes."""
    if not record.worker_id:
        raise ValueError("worker_id: must not be empty")
    if not (math.isfinite(ttl_s) and ttl_s > 0):
        raise ValueError(f"ttl_s: must be > 0, not {ttl_s}")


@dataclass(frozen=True, slots=True)
class _Lease:
    worker: LeasedWorker
    deadline_s: float


class MemoryDirectory:
    """A directory in this process. Blocks are bounded in number (least recently used go first) and in age."""

    def __init__(
        self,
        clock: Callable[[], float],
        first_epoch: int = 1,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        block_ttl_s: float = DEFAULT_BLOCK_TTL_S,
    ) -> None:
        self._clock = clock
        self._next_epoch = first_epoch
        self._max_blocks = max_blocks
        self._block_ttl_s = block_ttl_s
        self._leases: dict[str, _Lease] = {}
        self._deadline_by_location: OrderedDict[bytes, dict[str, float]] = OrderedDict()  # by block name
        self._lock = threading.Lock()

    def keep_alive(self, record: WorkerRecord, ttl_s: float, held_epoch: int = 0) -> int:
        """As in Directory."""
        check_keep_alive(record, ttl_s)
        with self._lock:
            now_s = self._clock()
            lease = self._leases.get(record.worker_id)
            if lease is not None and lease.deadline_s > now_s:
                epoch = lease.worker.epoch
            else:
                epoch = held_epoch or self._next_epoch
                self._next_epoch = max(self._next_epoch, epoch + 1)
            self._leases[record.worker_id] = _Lease(LeasedWorker(record, epoch), now_s + ttl_s)
            return epoch

    def withdraw(self, worker_id: str) -> None:
        """As in Directory."""
        with self._lock:
            self._leases.pop(worker_id, None)

    def workers(self) -> list[LeasedWorker]:
        """As in Directory."""
        with self._lock:
            now_s = self._clock()
            self._leases = {id_: lease for id_, lease in self._leases.items() if lease.deadline_s > now_s}
            return [self._leases[id_].worker for id_ in sorted(self._leases)]

    def publish(self, block_names: Sequence[bytes], location: str) -> None:
        """As in Directory."""
        with self._lock:
            deadline_s = self._clock() + self._block_ttl_s
            for name in block_names:
                self._deadline_by_location.setdefault(name, {})[location] = deadline_s
                self._deadline_by_location.move_to_end(name)
            while len(self._deadline_by_location) > self._max_blocks:
                self._deadline_by_location.popitem(last=False)

    def locate(self, block_names: Sequence[bytes]) -> list[frozenset[str]]:
        """As in Directory."""
        with self._lock:
            now_s = self._clock()
            return [self._locate(name, now_s) for name in block_names]

    def close(self) -> None:
        """As in Directory."""

    def _locate(self, name: bytes, now_s: float) -> frozenset[str]:
        deadlines = self._deadline_by_location.get(name)
        if deadlines is None:
            return frozenset()
        locations = frozenset(location for location, deadline_s in deadlines.items() if deadline_s > now_s)
        if locations:
            self._deadline_by_location.move_to_end(name)
        else:
            del self._deadline_by_location[name]
        return locations
