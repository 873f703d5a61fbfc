"""A request as it goes to workers: checked, encoded, admitted, with nothing left open."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from router.fleet.fleet import BlockNames
from router.sampling import SamplingParams


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
