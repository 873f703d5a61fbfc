"""What a tier is: a store that keeps fragments of KV blocks and gives back verified copies of them.

A tier may lose any fragment at any time. It never gives back bytes that differ from those that were stored, and it
never raises because its other end is away. Knows nothing of blocks, models or of which tier is asked first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvstore.format.fragment import Fragment, Rejected

if TYPE_CHECKING:
    from kvstore.format.copying import Bytes


class Tier(Protocol):
    """Thread-safe. Calls take a batch, so that a batch costs one round trip, not one per fragment."""

    @property
    def name(self) -> str:
        """Short name for counters: "host", "redis", "memory"."""

    @property
    def is_up(self) -> bool:
        """Whether the tier answered its last call. While it is down, store() gives False and load() gives None."""

    @property
    def problem(self) -> str:
        """Why the tier does less than it should, in one line: it is down, or does not take fragments. Empty: none."""

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        """Keeps the fragments; one that is there already is not written again. True where the fragment is there now."""

    def load(self, keys: Sequence[bytes]) -> Iterable[memoryview | Rejected | None]:
        """For each key a verified, private, writable copy of the payload; None when absent, Rejected when bad.

        May be made one by one as they are taken: a reader that keeps none of them uses one buffer, which stays in the
        CPU's caches.
        """

    def close(self) -> None:
        """Gives up connections and threads; the tier is down from then on."""


@runtime_checkable
class HostMemoryTier(Tier, Protocol):
    """A tier whose fragments lie in this host's memory: each is verified while it is copied to its destination."""

    @property
    def problems_behind(self) -> Mapping[str, str]:
        """Of tiers that this one brings fragments from, by name: why each does less than it should; empty: it does
        not."""

    def prepare(self, keys: Sequence[bytes]) -> None:
        """Begins what store() of these fragments, in this order, would otherwise wait for. The call will follow."""

    def load_into(self, keys: Sequence[bytes], buffers: Sequence[Bytes]) -> Iterable[bool | Rejected]:
        """As load(), with the payloads brought into the caller's own writable buffers: True for each one that came.

        The buffer of one that did not come holds anything. A payload that is not of its buffer's size is rejected.
        """
