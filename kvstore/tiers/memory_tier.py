"""A tier in this process's own memory: the fake beside the host and Redis tiers, and a store for a single process.

Same verification as the others. Knows nothing of other processes.
"""

import threading
from collections.abc import Sequence

from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import HEADER_BYTES, seal_into, unseal


class MemoryTier:
    """Sealed fragments in a dict; nothing is evicted."""

    name = "memory"

    def __init__(self) -> None:
        self.is_up = True
        """Set to False to see what others do without this tier."""
        self.stored: dict[bytes, bytearray] = {}
        """Header and payload by key; tests damage them here."""
        self._lock = threading.Lock()

    @property
    def problem(self) -> str:
        """As in Tier."""
        return "" if self.is_up else "switched off"

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        """As in Tier."""
        if not self.is_up:
            return [False] * len(fragments)
        with self._lock:
            for fragment in fragments:
                if fragment.key not in self.stored:
                    stored = bytearray(HEADER_BYTES + fragment.num_bytes)
                    seal_into(memoryview(stored), fragment.payload, fragment.key, 0)
                    self.stored[fragment.key] = stored
        return [True] * len(fragments)

    def load(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        """As in Tier."""
        if not self.is_up:
            return [None] * len(keys)
        return [self._load(key) for key in keys]

    def close(self) -> None:
        """As in Tier."""
        self.is_up = False

    def _load(self, key: bytes) -> memoryview | Rejected | None:
        with self._lock:
            held = self.stored.get(key)
            if held is None:
                return None
            result = unseal(memoryview(bytearray(held)), key, 0)
            if isinstance(result, Rejected):
                del self.stored[key]
            return result
