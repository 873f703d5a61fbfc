"""What one rank uses to publish and pull fragments: several tiers as one.

A put goes to every tier; a get takes the first good copy in the order of the tiers. Counts what moved and what was
refused. Knows nothing of blocks, tensors or of who else uses the tiers.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstore.tiers import Fragment, Rejected, Tier


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

    def put(self, fragments: Sequence[Fragment]) -> list[bool]:
        """Writes every fragment to every tier. True where at least one tier has it."""
        stored = [False] * len(fragments)
        if not fragments:
            return stored
        for tier in self._tiers:
            num_bytes = 0
            for i, is_stored in enumerate(tier.put(fragments)):
                if is_stored:
                    stored[i] = True
                    num_bytes += fragments[i].payload.nbytes
            with self._lock:
                self._published_bytes[tier.name] += num_bytes
        return stored

    def get(self, keys: Sequence[bytes]) -> list[memoryview | None]:
        """For each key a verified, private, writable copy, or None where no tier has a good one."""
        payloads: list[memoryview | None] = [None] * len(keys)
        missing = list(range(len(keys)))
        for tier in self._tiers:
            if not missing:
                break
            missing = self._get_from(tier, keys, missing, payloads)
        return payloads

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

    def _get_from(
        self, tier: Tier, keys: Sequence[bytes], wanted: Sequence[int], payloads: list[memoryview | None]
    ) -> list[int]:
        """Fills in what the tier has of `wanted`, indices into keys; returns the indices that are still missing."""
        missing: list[int] = []
        num_bytes = 0
        rejected: Counter[str] = Counter()
        for i, result in zip(wanted, tier.get([keys[i] for i in wanted]), strict=True):
            if isinstance(result, memoryview):
                payloads[i] = result
                num_bytes += result.nbytes
                continue
            missing.append(i)
            if isinstance(result, Rejected):
                rejected[result.reason] += 1
        with self._lock:
            self._pulled_bytes[tier.name] += num_bytes
            self._rejected.update(rejected)
        return missing
