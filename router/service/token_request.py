"""A request as it goes to workers: checked, encoded, admitted, with nothing left open."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from router.events import AdapterRef
from router.fleet.fleet import BlockNames
from router.sampling import SamplingParams

_WORKER_DEADLINE_SLACK_S = 1.0


def block_salt(tenant_salt: bytes, cache_salt: bytes) -> bytes:
    """The salt of block names: the tenant's, or what it and the request's own make."""
    if not cache_salt:
        return tenant_salt
    return hashlib.blake2b(cache_salt, digest_size=16, key=tenant_salt, person=b"switchyard-cache").digest()


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One stream's request. Times are on the dispatcher's clock."""

    stream_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    names: BlockNames
    arrived_s: float
    deadline_s: float | None
    tenant_salt: bytes
    """Of the names, and of those of all that is generated."""
    tenant: bytes
    """Whose share of a worker it uses."""
    priority: int
    """The smaller, the sooner."""
    weights: str
    """Digest of the weights that compute the stream, from its first token to its last."""
    adapter: AdapterRef | None = None
    """What is added to them."""

    @property
    def adapter_digest(self) -> bytes:
        """Of the names of its blocks; empty: no adapter."""
        return b"" if self.adapter is None else self.adapter.digest

    def worker_deadline_s(self, now_s: float) -> float:
        """Seconds from now after which a worker drops it; 0 means never.

        The deadline is enforced by the router; the worker's is a net for the case that the router dies.
        """
        return 0.0 if self.deadline_s is None else max(0.0, self.deadline_s - now_s) + _WORKER_DEADLINE_SLACK_S
