"""The journal of streams: for each its header, the committed tokens, and the epoch that may commit more.

`StreamJournal` is the seam; a file on one machine and a Redis fulfil it. Each stream has an epoch: a router that claims
it gets the next one, and commits of an earlier owner are refused, so two routers never both carry a stream. Knows
nothing of requests: a header is bytes, and an ending a word of the router's.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

DEFAULT_TTL_S = 600.0
"""How long a stream is kept after its last commit."""

DEFAULT_MAX_STREAMS = 100_000
"""More than these are not kept; those that would end first go first."""


class JournalUnavailable(Exception):
    """The journal cannot be reached: nothing was committed, and no router may take a stream over."""


class Verdict(Enum):
    """What became of one change."""

    COMMITTED = "committed"
    SUPERSEDED = "superseded"  # another owner has the stream
    MISSING = "missing"  # the stream, or tokens before these, are not in the journal: commit from its beginning


@dataclass(frozen=True, slots=True)
class Change:
    """More of one stream. A header opens it (again: what was there is replaced, unless its epoch is greater)."""

    stream_id: str
    epoch: int
    position: int
    """Of the first of token_ids in the completion."""
    token_ids: tuple[int, ...]
    header: bytes | None = None
    ending: str = ""
    """Not empty: the stream ended so, after token_ids."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A stream as it is found."""

    epoch: int
    """Its owner's; after a claim, the new one's."""
    header: bytes
    token_ids: tuple[int, ...]
    ending: str
    """Empty while the stream runs."""


class StreamJournal(Protocol):
    """Thread-safe. Every call may raise JournalUnavailable."""

    def commit(self, changes: Sequence[Change]) -> list[Verdict]:
        """Applies the changes in order, at once; when it returns they outlive this process. One verdict for each."""

    def look_up(self, stream_id: str) -> JournalEntry | None:
        """The stream as it is, under its owner's epoch. None when it is not known (any more)."""

    def claim(self, stream_id: str) -> JournalEntry | None:
        """Takes a stream over, under the next epoch. None when it is not known (any more)."""

    def close(self) -> None:
        """Gives up connections. What was committed stays."""


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """4 bytes each, little-endian."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_token_ids(packed: bytes) -> tuple[int, ...]:
    """The reverse of pack_token_ids."""
    return struct.unpack(f"<{len(packed) // 4}I", packed)
