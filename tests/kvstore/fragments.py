"""Fragments with random keys and contents."""

import random
from collections.abc import Sequence

from kvstore.authenticity import FragmentAuthenticator
from kvstore.names import fragment_key
from kvstore.redis_tier import KEY_PREFIX
from kvstore.tiers import Fragment

SECRET = "of the tests"
REDIS_PREFIX = KEY_PREFIX + FragmentAuthenticator(SECRET).key_id.encode() + b":"


def make_fragments(count: int, payload_bytes: int = 1000) -> list[Fragment]:
    """Fragments whose payloads are slices of one buffer, as a rank packs them. No two calls share a key."""
    buffer = memoryview(random.randbytes(count * payload_bytes))
    name = random.randbytes(16)
    return [
        Fragment(fragment_key(name, 0, 2, i), buffer[i * payload_bytes : (i + 1) * payload_bytes]) for i in range(count)
    ]


def keys_of(fragments: Sequence[Fragment]) -> list[bytes]:
    """Their keys."""
    return [fragment.key for fragment in fragments]
