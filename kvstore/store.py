"""What one rank uses to store and load fragments: several tiers as one.

A store goes to every tier; a load takes the first good copy in the order of the tiers. Counts what moved and what was
refused. Knows nothing of blocks, tensors or of who else uses the tiers.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kvstore.format.copying import Bytes, copy
from kvstore.format.fragment import Fragment, Rejected
from kvstore.tiers.tier import HostMemoryTier, Tier


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters of one store since it was made."""

    pulled_bytes: Mapping[str, int]
    """Verified payload bytes handed out, by tier."""
    published_bytes: Mapping[str, int]
    """Payload bytes that a tier has after a store, by tier; also those that it had before."""
    rejected: Mapping[str, int]
    """Stored fragments that failed their verification, by reason."""
    tier_is_up: Mapping[str, bool]
    """Whether each tier answered when it was last asked."""
    tier_problems: Mapping[str, str]
    """Why a tier does less than it should; only of those that do."""


class FragmentStore:
    """Tiers in the order in which they are asked. Thread-safe."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = tuple(tiers)
        # Once: to ask a protocol costs as much as copying a fragment.
        self._host_memory_tiers = [tier for tier in tiers if isinstance(tier, HostMemoryTier)]
        self._load_into = [
            tier.load_into if isinstance(tier, HostMemoryTier) else partial(_load_into, tier) for tier in tiers
        ]
        self._lock = threading.Lock()
        self._pulled_bytes: Counter[str] = Counter()
        self._published_bytes: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def prepare(self, keys: Sequence[bytes]) -> None:
        """As HostMemoryTier.prepare."""
        for tier in self._host_memory_tiers:
            tier.prepare(keys)

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        """Writes every fragment to every tier. True where at least one tier has it."""
        stored = [False] * len(fragments)
        if not fragments:
            return stored
        for tier in self._tiers:
            num_bytes = 0
            for i, is_stored in enumerate(tier.store(fragments)):
                if is_stored:
                    stored[i] = True
                    num_bytes += fragments[i].num_bytes
            with self._lock:
                self._published_bytes[tier.name] += num_bytes
        return stored

    def load(self, keys: Sequence[bytes], buffers: Sequence[Bytes]) -> list[bool]:
        """Brings verified payloads into writable buffers of the expected sizes; which ones came.

        The buffer of one that did not come holds anything.
        """
        has_come = [False] * len(keys)
        for tier, load_into in zip(self._tiers, self._load_into, strict=True):
            missing = [i for i, is_there in enumerate(has_come) if not is_there]
            if not missing:
                break
            num_bytes = 0
            rejected: Counter[str] = Counter()
            results = load_into([keys[i] for i in missing], [buffers[i] for i in missing])
            for i, result in zip(missing, results, strict=True):
                if result is True:
                    has_come[i] = True
                    num_bytes += buffers[i].nbytes
                elif isinstance(result, Rejected):
                    rejected[result.reason] += 1
            with self._lock:
                self._pulled_bytes[tier.name] += num_bytes
                self._rejected.update(rejected)
        return has_come

    def stats(self) -> StoreStats:
        """The counters now."""
        tier_is_up = {tier.name: tier.is_up for tier in self._tiers}
        problems = {tier.name: tier.problem for tier in self._tiers}
        for tier in self._host_memory_tiers:
            problems |= tier.problems_behind
            tier_is_up |= {name: not problem for name, problem in tier.problems_behind.items()}
        with self._lock:
            return StoreStats(
                pulled_bytes=dict(self._pulled_bytes),
                published_bytes=dict(self._published_bytes),
                rejected=dict(self._rejected),
                tier_is_up=tier_is_up,
                tier_problems={name: problem for name, problem in problems.items() if problem},
            )

    def close(self) -> None:
        """Closes the tiers."""
        for tier in self._tiers:
            tier.close()


def _load_into(tier: Tier, keys: Sequence[bytes], buffers: Sequence[Bytes]) -> Iterator[bool | Rejected]:
    """As HostMemoryTier.load_into, for a tier whose private copies are copied once more."""
    found = iter(tier.load(keys))
    for buffer in buffers:
        payload = next(found)
        if isinstance(payload, memoryview):
            if payload.nbytes != buffer.nbytes:
                yield Rejected("layout")  # good bytes, but not what this model has under that name
            else:
                copy(buffer, payload)
                yield True
        else:
            yield False if payload is None else payload
        del payload  # or its buffer would be in use while the next one is looked for
