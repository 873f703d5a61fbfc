"""Which KV blocks a worker holds: what it reported in block events, and what this router sent it since.

Without block events the router guesses from what it sent there: workers evict on their own, and other routers send them
work too. The guess has the worker's own number of blocks as its bound, and the worker's own order (least recently used
goes first, tails before heads), so it stays close. Pure; knows nothing of tokens, costs or connections.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_FADE_MESSAGES = 2  # the first message after a stream's end may have been on its way before it


class SeenBlocks:
    """Names of the blocks that one worker probably holds. Whenever a block is in, so are its ancestors."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max(1, max_blocks)
        self._names: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._names)

    def match_prefix(self, names: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt are in; not counted as use. O(log len(names)), for ancestors are in."""
        low, high = 0, len(names)
        while low < high:
            middle = (low + high + 1) // 2
            if names[middle - 1] in self._names:
                low = middle
            else:
                high = middle - 1
        return low

    def remember(self, names: Sequence[bytes]) -> None:
        """The worker was given a prompt with these blocks, in order from its start."""
        # From the tail to the head: the head is the most recently used, so eviction takes tails first and never leaves
        # a block without its ancestors. A prompt longer than the bound keeps its head.
        for name in reversed(names[: self._max_blocks]):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._max_blocks:
            self._names.popitem(last=False)


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """Some of all the names that a worker holds; the parts of one snapshot come one after the other."""

    sequence: int
    part: int
    is_last: bool
    names: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """Blocks stored and removed since the worker's last event."""

    after: int
    sequence: int
    stored: Sequence[bytes]
    removed: Sequence[bytes]


BlockEvent = SnapshotPart | BlockChanges


class HeldBlocks:
    """Names of the blocks that one worker holds.

    After a whole snapshot: what the worker reported, and what this router sent since without a confirmation yet.
    Before one, and after an event was missed: SeenBlocks' guess.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max(1, max_blocks)
        self._guess = SeenBlocks(max_blocks)
        self._reported: set[bytes] | None = None
        self._sequence = 0  # of the last event in _reported
        self._parts: set[bytes] = set()  # of the snapshot that is coming in
        self._num_parts = 0
        self._num_messages = 0
        self._sent: OrderedDict[bytes, int] = OrderedDict()  # not confirmed: how many live streams brought each
        self._fading: OrderedDict[bytes, int] = OrderedDict()  # of no live stream: the message that ends each

    @property
    def num_reported(self) -> int | None:
        """How many blocks the worker reported; None while the guess is used."""
        return None if self._reported is None else len(self._reported)

    def match_prefix(self, names: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt are in; not counted as use."""
        if self._reported is None:
            return self._guess.match_prefix(names)
        # One after the other: a worker may have evicted a block whose descendants it still holds, when two streams
        # computed the same prompt side by side and the one whose blocks got the names ended first.
        reported, sent, fading = self._reported, self._sent, self._fading
        for index, name in enumerate(names):
            if not (name in reported or name in sent or name in fading):
                return index
        return len(names)

    # -- what this router does

    def send(self, names: Sequence[bytes]) -> Sequence[bytes]:
        """A stream with these blocks goes to the worker: they count from now on. Those that let_go() ends."""
        self._guess.remember(names)
        reported = self._reported or ()
        sent = [name for name in names[: self._max_blocks] if name not in reported]
        for name in sent:
            self._sent[name] = self._sent.get(name, 0) + 1
            self._fading.pop(name, None)
        while len(self._sent) > self._max_blocks:
            self._sent.popitem(last=False)
        return sent

    def let_go(self, sent: Sequence[bytes]) -> None:
        """The stream left the worker: what was not confirmed by now must be soon."""
        for name in sent:
            count = self._sent.get(name, 0)
            if count > 1:
                self._sent[name] = count - 1
            elif count == 1:
                del self._sent[name]
                self._fade(name)

    def remember(self, names: Sequence[bytes]) -> None:
        """A stream that ended left these blocks behind."""
        self._guess.remember(names)
        reported = self._reported or ()
        for name in names:
            if not (name in reported or name in self._sent or name in self._fading):
                self._fade(name)

    def _fade(self, name: bytes) -> None:
        self._fading[name] = self._num_messages + _FADE_MESSAGES
        self._fading.move_to_end(name)
        while len(self._fading) > self._max_blocks:
            self._fading.popitem(last=False)

    # -- the worker's block events

    def apply(self, event: BlockEvent) -> bool:
        """False: an event is missing. The guess is used until the next snapshot, which the caller must ask for."""
        fits = self._apply_part(event) if isinstance(event, SnapshotPart) else self._apply_changes(event)
        if not fits:
            self.lose_track()
            return False
        if isinstance(event, SnapshotPart) and not event.is_last:
            return True
        self._num_messages += 1
        while self._fading and next(iter(self._fading.values())) <= self._num_messages:
            self._fading.popitem(last=False)
        return True

    def lose_track(self) -> None:
        """The worker's block events ended."""
        self._reported = None
        self._parts = set()
        self._num_parts = 0

    def _apply_part(self, event: SnapshotPart) -> bool:
        if event.part == 0:
            self.lose_track()
            self._sequence = event.sequence
        elif (event.part, event.sequence) != (self._num_parts, self._sequence):
            return False
        self._num_parts += 1
        self._parts.update(event.names)
        if event.is_last:
            self._reported, self._parts = self._parts, set()
            for name in [name for name in self._sent if name in self._reported]:
                del self._sent[name]
            self._num_parts = 0
        return True

    def _apply_changes(self, event: BlockChanges) -> bool:
        if self._reported is None or event.after != self._sequence:
            return False
        self._sequence = event.sequence
        self._reported.difference_update(event.removed)
        self._reported.update(event.stored)
        for name in event.stored:
            self._sent.pop(name, None)
            self._fading.pop(name, None)
        for name in event.removed:
            self._fading.pop(name, None)
        return True
