"""A fragment of a KV block on its way to or from a tier, and why a stored one was refused. Knows nothing of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from kvstore.format.copying import Bytes

RejectReason = Literal["checksum", "stale", "truncated", "layout", "forged"]


class Fragment(NamedTuple):
    """One block x a group of layers x one KV head, wherever its bytes lie; they stay until store() returns."""

    key: bytes
    """From kvstore.names."""
    payload: Bytes
    """Of any shape and strides, as in kvstore.format.copying: a slice of a buffer, or a part of a paged cache."""

    @property
    def num_bytes(self) -> int:
        """Size of the payload."""
        return self.payload.nbytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """A stored fragment that failed its verification; the tier has dropped it."""

    reason: RejectReason
    """checksum: other bytes; stale: the slot holds another fragment now; truncated: bytes are missing; layout: not a
    fragment of ours; forged: consistent, but written without the cluster's secret."""
