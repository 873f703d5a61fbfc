"""Whose KV blocks a request may share: a salt made from the credential that came with the call.

Block names begin with it, so a prefix that one tenant computed is never found by another, and how fast an answer comes
shows nothing of what others asked.

A request's own cache_salt only parts a tenant's requests further. Whether a credential is valid is decided in front of
this router; here two that differ are two tenants, and calls without one share a tenant. Knows nothing of HTTP or gRPC.
"""

from __future__ import annotations

import hashlib

_PERSON = b"switchyard-salt"


def tenant_salt(authorization: str) -> bytes:
    """From the value of an Authorization header ("Bearer KEY", or the key alone); empty for none.

    The salt goes into journals and to workers; the key cannot be read back from it.
    """
    words = authorization.split()
    if words and words[0].lower() == "bearer":
        del words[0]
    if not words:
        return b""
    credential = " ".join(words)
    return hashlib.blake2b(credential.encode(), digest_size=16, person=_PERSON).digest()
