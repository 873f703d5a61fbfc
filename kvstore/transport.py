"""The seam for ways to move fragments between hosts: one way to one peer, whatever carries the bytes.

TCP is kvstore.tcp_transport; one over RDMA fills in the same. Verification is the tier's, the same for all of them.
Knows nothing of networks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.tiers import Rejected


@dataclass(frozen=True, slots=True)
class Pulled:
    """A fragment as it came; nothing of it is verified."""

    sealed: memoryview
    """Private copy of header and payload; empty when not all of it came."""
    generation: int
    """What the peer says that its slot's header has."""
    tag: bytes
    is_current: bool
    """Whether the peer's slot still had that generation when all of it was sent."""


class Transport(Protocol):
    """Not thread-safe: a tier has one for each thread that pulls."""

    def pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        """The fragments that the peer has, as they come, with their indices into keys; Rejected where it found its own
        bad. Raises OSError when the peer is away, or not through by deadline_s (monotonic); of no use then."""

    def check(self, keys: Sequence[bytes], deadline_s: float) -> None:
        """Has the peer verify fragments that came bad, and forget those that are. Raises as pull."""

    def close(self) -> None:
        """Gives up the connection."""
