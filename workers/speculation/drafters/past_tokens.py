"""Where the last tokens of a sequence have come before in it. Grows with the sequence; pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

MAX_PLACES = 16  # of the same tokens that are kept, the latest ones
_INDEXED_AT_ONCE = 2048  # tokens: of a long prompt more than that would hold up all streams


class PastTokens:
    """Of one sequence. width: how many tokens must be the same, at least."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._ends: dict[tuple[int, ...], deque[int]] = {}
        self._num_indexed = width - 1

    def places(self, token_ids: Sequence[int]) -> Iterator[int]:
        """Ends, as indices into token_ids, of earlier runs that equal its last tokens; the latest first.

        token_ids: those of the last call, and more after them.
        """
        width, ends = self._width, self._ends
        last = min(len(token_ids), self._num_indexed + 1 + _INDEXED_AT_ONCE)
        for end in range(self._num_indexed + 1, last):  # not the last run: it is what is looked for
            ends.setdefault(tuple(token_ids[end - width : end]), deque(maxlen=MAX_PLACES)).append(end)
        self._num_indexed = max(self._num_indexed, last - 1)
        if len(token_ids) >= width:
            yield from reversed(ends.get(tuple(token_ids[len(token_ids) - width :]), ()))


def match_length(token_ids: Sequence[int], other: Sequence[int], end: int, most: int) -> int:
    """How many of the last tokens of a sequence equal those of another before `end`; at most so many."""
    most = min(most, end, len(token_ids))
    length, last = 0, len(token_ids) - 1
    while length < most and other[end - 1 - length] == token_ids[last - length]:
        length += 1
    return length
