"""The order of eviction: fragments that are used again later stay longer than those of one KV transfer.

A segmented LRU (Karedla, Love and Wherry, 1994). A KV transfer stores a fragment and loads it, once or several times
within seconds, and most fragments are never used again. One that is used again belongs to a prefix that requests share,
or to a conversation that went on. Those form a segment of their own, so that a burst of prompts that nobody repeats
evicts only its like. A use soon after the fragment came counts as one use with its coming (the correlated references of
O'Neil, O'Neil and Weikum's LRU-K, 1993). Pure. Knows nothing of slots or sizes.
"""

from collections import OrderedDict
from collections.abc import Iterator

_KV_TRANSFER_S = 10.0  # for so long after it came, a use belongs to the KV transfer that stored it
_SHARE_KEPT = 0.5  # of all, for what was used again; what is being handed off always has the rest


class ReuseOrder:
    """Keys in the order in which they are to go. Not thread-safe. capacity: how many there are at most."""

    def __init__(self, capacity: int) -> None:
        self._max_reused = int(capacity * _SHARE_KEPT)
        self._came_s: OrderedDict[bytes, float] = OrderedDict()  # of those not used again; least recently used first
        self._reused: OrderedDict[bytes, None] = OrderedDict()

    def __iter__(self) -> Iterator[bytes]:
        """The next to go comes first."""
        yield from self._came_s
        yield from self._reused

    def add(self, key: bytes, now_s: float) -> None:
        """A new one."""
        self._came_s[key] = now_s

    def use(self, key: bytes, now_s: float) -> None:
        """It was asked for."""
        if key in self._reused:
            self._reused.move_to_end(key)
        elif now_s - self._came_s[key] < _KV_TRANSFER_S or self._max_reused == 0:
            self._came_s.move_to_end(key)
        else:
            del self._came_s[key]
            self._reused[key] = None
            if len(self._reused) > self._max_reused:
                longest_unused, _ = self._reused.popitem(last=False)
                self._came_s[longest_unused] = now_s

    def discard(self, key: bytes) -> None:
        """It is gone."""
        self._came_s.pop(key, None)
        self._reused.pop(key, None)
