"""The names of one device's KV blocks, and their latest changes, for followers elsewhere.

Changes are numbered. A follower names its last change and gets the later ones; one that is too far behind gets nothing
and takes a snapshot. Pure, and not thread-safe: one thread owns a log. Knows nothing of followers, of wires or of the
value of a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_MAX_NAMES = 1 << 15  # in the changes that are kept
MAX_NAMES_AT_ONCE = 2048  # 32 KiB of names: little enough that nothing has to wait long behind it


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """From one point to a later one: names that are held now and were not, or perhaps were; and the contrary."""

    after: int
    sequence: int
    stored: Sequence[bytes]
    removed: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class BlockSnapshot:
    """All names that are held at one point."""

    sequence: int
    names: Sequence[bytes]


class BlockLog:
    """The names that a device holds, and the last `max_names` of their changes.

    Begins anew with every `restart`; sequence numbers go on, so no number is used twice.
    """

    def __init__(self, max_names: int = DEFAULT_MAX_NAMES) -> None:
        self._max_names = max_names
        self._held: dict[bytes, None] = {}
        self._changes: deque[Mapping[bytes, bool]] = deque()  # the last of them led to `sequence`
        self._num_names = 0  # in _changes
        self.sequence = 0

    def restart(self, names: Sequence[bytes]) -> None:
        """These are held, whatever was said before: everybody needs a snapshot."""
        self._held = dict.fromkeys(names)
        self._changes.clear()
        self._num_names = 0
        self.sequence += 1

    def append(self, changes: Mapping[bytes, bool]) -> None:
        """For each name whether it is held now. Many at once become several changes, so that none is large."""
        entries = list(changes.items())
        for start in range(0, len(entries), MAX_NAMES_AT_ONCE):
            self._append(dict(entries[start : start + MAX_NAMES_AT_ONCE]))

    def snapshot(self) -> BlockSnapshot:
        """Where everybody may begin."""
        return BlockSnapshot(self.sequence, list(self._held))

    def since(self, sequence: int) -> BlockChanges | None:
        """What came after; only the first part of it when it is much. None: that is not known any more."""
        first = self.sequence - len(self._changes)
        if not first <= sequence <= self.sequence:
            return None
        merged: dict[bytes, bool] = {}
        reached = sequence
        for index in range(sequence - first, len(self._changes)):
            changes = self._changes[index]
            if merged and len(merged) + len(changes) > MAX_NAMES_AT_ONCE:
                break
            merged.update(changes)
            reached += 1
        stored = [name for name, is_held in merged.items() if is_held]
        removed = [name for name, is_held in merged.items() if not is_held]
        return BlockChanges(sequence, reached, stored, removed)

    def _append(self, changes: Mapping[bytes, bool]) -> None:
        for name, is_held in changes.items():
            if is_held:
                self._held[name] = None
            else:
                self._held.pop(name, None)
        self.sequence += 1
        self._changes.append(changes)
        self._num_names += len(changes)
        while self._num_names > self._max_names:
            self._num_names -= len(self._changes.popleft())
