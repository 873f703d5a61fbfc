"""The order in which fragments are given up: what is asked for again later stays longer than what was handed off.

A segmented LRU (Karedla, Love and Wherry, 1994). A hand-off puts a fragment in and takes it out, once or several times
within seconds, and most fragments are never asked for again; one that is belongs to a prefix that others share, or to a
conversation that went on. Those are kept apart, so that a burst of prompts that nobody repeats pushes out its like and
not them. What is asked for soon after it came is one use with its coming (the correlated references of O'Neil, O'Neil
and Weikum's LRU-K, 1993). Pure. Knows nothing of slots or sizes.
"""

from collections import OrderedDict
from collections.abc import Iterator

_HAND_OFF_S = 10.0  # for so long after it came, what asks for it is the hand-off that it came for
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
        elif now_s - self._came_s[key] < _HAND_OFF_S or self._max_reused == 0:
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
