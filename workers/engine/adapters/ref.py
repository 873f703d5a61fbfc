"""What an engine says of an adapter: to its ranks in a plan, and between its own parts. Knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """The adapter of a request."""

    name: str  # for messages
    digest: bytes  # DIGEST_BYTES, of its content
    path: str  # of its directory, as every rank's host sees it

    def is_same(self, other: AdapterRef) -> bool:
        """Whether both are the same bytes in the same place, whatever they are called."""
        return (self.digest, self.path) == (other.digest, other.path)


class AdapterAction(IntEnum):
    """What a rank does with an adapter."""

    READ = 0  # from its files into host memory, in a thread beside the steps
    COPY = 1  # from host memory into a slot of the device, within the step
    DROP = 2  # from host memory
    KEEP = 3  # of a full plan: it is in host memory; those that a full plan does not name are dropped


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """A part of a plan; orders are carried out one after the other, before the step computes."""

    action: AdapterAction
    digest: bytes
    number: int = 0  # READ: id of a transfer, which ends when it is read. COPY: the slot
    path: str = ""  # READ


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """How many adapters an engine holds; none by default."""

    num_slots: int = 0  # on the device
    max_loaded: int = 0  # in host memory, those on the device included


NO_ADAPTERS = AdapterLimits()
