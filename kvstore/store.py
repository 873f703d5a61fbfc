"""What one rank uses to publish and pull fragments: several tiers as one.

A put goes to every tier; a get takes the first good copy in the order of the tiers. Counts what moved and what was
refused. Knows nothing of blocks, tensors or of who else uses the tiers.
"""

import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvstore.tiers import FragmentSource, Tier


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters of one store since it was made."""

    pulled_bytes: Mapping[str, int]
    """Verified payload bytes handed out, by tier."""
    published_bytes: Mapping[str, int]
    """Payload bytes that a tier has after a put, by tier; also those that it had before."""
    rejected: Mapping[str, int]
    """Stored fragments that failed their verification, by reason."""
    tier_is_up: Mapping[str, bool]
    """Whether each tier answered when it was last asked."""


class FragmentStore:
    """Tiers in the order in which they are asked. Thread-safe."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = tuple(tiers)
        self._lock = threading.Lock()
        self._pulled_bytes: Counter[str] = Counter()
        self._published_bytes: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def put(self, fragments: Sequence[FragmentSource]) -> list[bool]:
        """Writes every fragment to every tier. True where at least one tier has it."""
        stored = [False] * len(fragments)
        if not fragments:
            return stored
        for tier in self._tiers:
            num_bytes = 0
            for i, is_stored in enumerate(tier.put(fragments)):
                if is_stored:
                    stored[i] = True
                    num_bytes += fragments[i].num_bytes
            with self._lock:
                self._published_bytes[tier.name] += num_bytes
        return stored

    def pull(self, keys: Sequence[bytes]) -> Iterator[tuple[int, memoryview]]:
        """(index into keys, verified private copy) of each fragment that some tier has, as they come."""
        missing = list(range(len(keys)))
        for tier in self._tiers:
            if not missing:
                break
            missing = yield from self._pull_from(tier, keys, missing)

    def stats(self) -> StoreStats:
        """The counters now."""
        with self._lock:
            return StoreStats(
                pulled_bytes=dict(self._pulled_bytes),
                published_bytes=dict(self._published_bytes),
                rejected=dict(self._rejected),
                tier_is_up={tier.name: tier.is_up for tier in self._tiers},
            )

    def close(self) -> None:
        """Closes the tiers."""
        for tier in self._tiers:
            tier.close()

    def _pull_from(
        self, tier: Tier, keys: Sequence[bytes], wanted: Sequence[int]
    ) -> Generator[tuple[int, memoryview], None, list[int]]:
        """What the tier has of `wanted`, indices into keys; returns the indices that are still missing."""
        missing: list[int] = []
        num_bytes = 0
        rejected: Counter[str] = Counter()
        found = iter(tier.get([keys[i] for i in wanted]))
        for i in wanted:
            result = next(found)
            if isinstance(result, memoryview):
                num_bytes += result.nbytes
                yield i, result
            else:
                missing.append(i)
                if result is not None:
                    rejected[result.reason] += 1
            del result  # or its buffer would be in use while the next one is looked for
        with self._lock:
            self._pulled_bytes[tier.name] += num_bytes
            self._rejected.update(rejected)
        return missing
