"""The order in which fragments are given up: what was used again stays longer than what was used once.

A segmented LRU (Karedla, Love and Wherry, 1994). A hand-off puts a fragment in and takes it out once, and most
fragments are never asked for again; one that is belongs to a prefix that others share, or to a conversation that went
on. Those are kept apart, so that a burst of prompts that nobody repeats pushes out its like and not them. Pure. Knows
nothing of slots or sizes.
"""

from collections import OrderedDict
from collections.abc import Iterator

_USES_OF_A_HAND_OFF = 1
_SHARE_KEPT = 0.8  # of all, for what was used again; the rest always has room for what comes


class ReuseOrder:
    """Keys in the order in which they are to go. Not thread-safe. capacity: how many there are at most."""

    def __init__(self, capacity: int) -> None:
        self._max_reused = int(capacity * _SHARE_KEPT)
        self._once: OrderedDict[bytes, int] = OrderedDict()  # uses by key; least recently used first
        self._reused: OrderedDict[bytes, None] = OrderedDict()

    def __iter__(self) -> Iterator[bytes]:
        """The next to go comes first."""
        yield from self._once
        yield from self._reused

    def add(self, key: bytes) -> None:
        """A new one."""
        self._once[key] = 0

    def use(self, key: bytes) -> None:
        """It was asked for."""
        if key in self._reused:
            self._reused.move_to_end(key)
            return
        self._once[key] += 1
        self._once.move_to_end(key)
        if self._once[key] > _USES_OF_A_HAND_OFF and self._max_reused > 0:
            del self._once[key]
            self._reused[key] = None
            if len(self._reused) > self._max_reused:
                longest_unused, _ = self._reused.popitem(last=False)
                self._once[longest_unused] = 0

    def discard(self, key: bytes) -> None:
        """It is gone."""
        self._once.pop(key, None)
        self._reused.pop(key, None)
