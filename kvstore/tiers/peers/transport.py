"""The seam for ways to move fragments between hosts: one way to one peer, whatever carries the bytes.

kvstore.tiers.peers.tcp_transport receives them on the connection on which it asks; kvstore.tiers.peers.nixl_transport
reads them from the peer's memory. Verification is the tier's, the same for all of them. Knows nothing of networks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.format.fragment import Rejected


@dataclass(frozen=True, slots=True)
class Pulled:
    """A fragment as it came; nothing of it is verified."""

    sealed: memoryview
    """Private copy of header and payload; empty when not all of it came."""
    generation: int
    """What the peer says that its slot's header has."""
    tag: bytes
    is_current: bool
    """Whether the peer's slot still had that generation when all of it was there."""


NOTHING_CAME = Pulled(memoryview(b""), 0, b"", True)
"""A fragment that the peer announced, and that did not come."""


class Transport(Protocol):
    """Not thread-safe: a tier has one for each thread that pulls."""

    def pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        """The fragments that the peer has, as they come, with their indices into keys; Rejected where it found its own
        bad. Raises OSError when the peer is away, or not through by deadline_s (monotonic); of no use then."""

    def check(self, keys: Sequence[bytes], deadline_s: float) -> None:
        """Has the peer verify fragments that came bad, and forget those that are. Raises as pull."""

    def close(self) -> None:
        """Gives up the connection."""


class ReadableMemory(Protocol):
    """The other end of transports that read by themselves: an arena that other hosts may read from. Thread-safe."""

    @property
    def description(self) -> bytes:
        """All that a reader needs to know, but for where a fragment lies."""

    def address_of(self, slot: int) -> int:
        """Where the slot's header begins, as an address that readers use."""

    def progress(self) -> None:
        """Does what a read in progress needs from this end; called again and again while there is one."""

    def close(self) -> None:
        """Nothing can be read from then on."""
