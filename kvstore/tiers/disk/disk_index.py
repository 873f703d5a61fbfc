"""The books of the disk tier: which fragment is where, how large each segment is, and which segment goes next.

The oldest segment goes first, but one that was read since it was last its turn gets another round. Pure; knows nothing
of files.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvstore.tiers.disk.segments import StoredFragment


@dataclass(slots=True)
class _Segment:
    file_bytes: int
    keys: list[bytes] = field(default_factory=list)
    num_reads: int = 0  # since it was last its turn to go


class DiskIndex:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._fragments: dict[bytes, StoredFragment] = {}
        self._segments: OrderedDict[int, _Segment] = OrderedDict()  # next to go first

    @property
    def num_fragments(self) -> int:
        """Fragments that can be read."""
        return len(self._fragments)

    @property
    def num_segments(self) -> int:
        """Segments, the open one included."""
        return len(self._segments)

    @property
    def used_bytes(self) -> int:
        """Of the segments' files."""
        return sum(segment.file_bytes for segment in self._segments.values())

    def clear(self) -> None:
        """As if nothing had been written."""
        self._fragments.clear()
        self._segments.clear()

    def resize(self, number: int, file_bytes: int) -> None:
        """A new segment, or the size that one has now."""
        self._segments.setdefault(number, _Segment(0)).file_bytes = file_bytes

    def remove(self, number: int) -> None:
        """Forgets a segment and what is in it."""
        for key in self._segments.pop(number).keys:
            stored = self._fragments.get(key)
            if stored is not None and stored.segment == number:
                del self._fragments[key]

    def evict(self) -> int:
        """Forgets the segment that is next to go; its number. There must be one."""
        while True:
            number, segment = next(iter(self._segments.items()))
            if segment.num_reads == 0:
                self.remove(number)
                return number
            segment.num_reads = 0
            self._segments.move_to_end(number)

    def remember(self, key: bytes, stored: StoredFragment) -> None:
        """A fragment of a segment that is known; the one that was written last counts."""
        self._fragments[key] = stored
        self._segments[stored.segment].keys.append(key)

    def forget(self, key: bytes, stored: StoredFragment) -> bool:
        """The fragment at this location is of no use; False when it is elsewhere now, or nowhere."""
        if self._fragments.get(key) != stored:
            return False
        del self._fragments[key]
        return True

    def has(self, key: bytes) -> bool:
        """Whether there is such a fragment; no use of it."""
        return key in self._fragments

    def use(self, key: bytes) -> StoredFragment | None:
        """Where the fragment is, which is to be read."""
        stored = self._fragments.get(key)
        if stored is not None:
            self._segments[stored.segment].num_reads += 1
        return stored
