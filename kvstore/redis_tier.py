"""The tier that hosts share: fragments as values in a Redis that may evict them.

A value is a whole sealed fragment (header and payload, see kvstore.sealing) and a tag that only who knows the cluster's
secret can make (kvstore.authenticity), under a key with the format's version and the secret's id. Redis forgets it when
nobody wrote it for `ttl_s`. Batches go out as pipelines of a few megabytes. Knows nothing of
leases and the directory, which live in a Redis that must not evict.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from kvstore.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.availability import Availability
from kvstore.redis_client import REDIS_ERRORS, address_of, connect
from kvstore.sealing import HEADER_BYTES, as_bytes_view, seal, unseal
from kvstore.tiers import Fragment, Rejected

_LOG = logging.getLogger(__name__)

KEY_PREFIX = b"switchyard:kv2:"

CHUNK_BYTES = 4 * 1024 * 1024
_MAX_CHUNK_KEYS = 1024
_FIRST_GUESS_BYTES = 256 * 1024


class RedisTier:
    """A client of the Redis at `url`."""

    name = "redis"

    def __init__(self, url: str, secret: str, ttl_s: float = 3600.0) -> None:
        self._client = connect(url)
        self._authenticator = FragmentAuthenticator(secret)
        self.key_prefix = KEY_PREFIX + self._authenticator.key_id.encode() + b":"
        self._ttl_ms = int(ttl_s * 1000)
        self._value_bytes = _FIRST_GUESS_BYTES  # of the value seen last: how many keys make a chunk
        self._has_warned_of_refusal = False
        name = f"redis tier at {address_of(self._client)}"
        self._availability = Availability(name, self._ping, self._ping, REDIS_ERRORS)

    @property
    def is_up(self) -> bool:
        """As in Tier."""
        return self._availability.is_up

    def put(self, fragments: Sequence[Fragment]) -> list[bool]:
        """As in Tier. What is there already lives for another ttl_s."""
        stored = [False] * len(fragments)
        if not self.is_up or not fragments:
            return stored
        try:
            missing = self._renew(fragments, stored)
            for chunk in _chunks_by_size(fragments, missing):
                self._write(fragments, chunk, stored)
        except REDIS_ERRORS as error:
            self._availability.lost(error)
        return stored

    def get(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        """As in Tier."""
        payloads: list[memoryview | Rejected | None] = [None] * len(keys)
        if not self.is_up:
            return payloads
        try:
            start = 0
            while start < len(keys):
                num_keys = min(_MAX_CHUNK_KEYS, max(1, CHUNK_BYTES // self._value_bytes))
                chunk = keys[start : start + num_keys]
                payloads[start : start + num_keys] = self._read(chunk)
                start += num_keys
        except REDIS_ERRORS as error:
            self._availability.lost(error)
        return payloads

    def close(self) -> None:
        """As in Tier."""
        self._availability.close()  # a redis client must not be closed under a call in progress
        self._client.close()

    def _ping(self) -> None:
        self._client.ping()

    def _renew(self, fragments: Sequence[Fragment], stored: list[bool]) -> list[int]:
        """Marks the fragments that Redis has and gives them a new TTL; indices of the others."""
        missing: list[int] = []
        for start in range(0, len(fragments), _MAX_CHUNK_KEYS):
            keys = [self.key_prefix + fragment.key for fragment in fragments[start : start + _MAX_CHUNK_KEYS]]
            if not self._client.exists(*keys):  # one short command instead of many: most batches are new
                missing.extend(range(start, start + len(keys)))
                continue
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.pexpire(key, self._ttl_ms)
            for i, is_there in enumerate(pipeline.execute(), start):
                stored[i] = bool(is_there)
                if not is_there:
                    missing.append(i)
        return missing

    def _write(self, fragments: Sequence[Fragment], chunk: Sequence[int], stored: list[bool]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for i in chunk:
            key, payload = fragments[i].key, fragments[i].payload
            value = b"".join((seal(key, payload, 0), as_bytes_view(payload)))
            value += self._authenticator.tag(value)
            self._value_bytes = len(value)
            pipeline.set(self.key_prefix + key, value, px=self._ttl_ms)
        for i, reply in zip(chunk, pipeline.execute(raise_on_error=False), strict=True):
            stored[i] = reply is True
            if isinstance(reply, Exception):
                self._warn_of_refusal(reply)

    def _read(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        values: Any = self._client.mget([self.key_prefix + key for key in keys])
        payloads: list[memoryview | Rejected | None] = []
        bad: list[bytes] = []
        for key, value in zip(keys, values, strict=True):
            if value is None:
                payloads.append(None)
                continue
            self._value_bytes = max(len(value), HEADER_BYTES)
            payload = self._verified(memoryview(bytearray(value)), key)
            if isinstance(payload, Rejected):
                bad.append(self.key_prefix + key)
            payloads.append(payload)
        if bad:
            self._client.delete(*bad)
        return payloads

    def _verified(self, value: memoryview, key: bytes) -> memoryview | Rejected:
        if len(value) < TAG_BYTES:
            return Rejected("truncated")
        fragment, tag = value[:-TAG_BYTES], value[-TAG_BYTES:]
        payload = unseal(fragment, key, 0)  # first: it tells one fault from another
        if not isinstance(payload, Rejected) and not self._authenticator.is_genuine(fragment, tag):
            return Rejected("forged")
        return payload

    def _warn_of_refusal(self, reply: Exception) -> None:
        """Redis answers but does not take fragments, for example because its memory is full and it may not evict."""
        if not self._has_warned_of_refusal:
            self._has_warned_of_refusal = True
            _LOG.warning("redis tier at %s refuses fragments: %s", address_of(self._client), reply)


def _chunks_by_size(fragments: Sequence[Fragment], indices: Sequence[int]) -> Iterator[list[int]]:
    """The indices in groups of about CHUNK_BYTES."""
    chunk: list[int] = []
    chunk_bytes = 0
    for i in indices:
        value_bytes = HEADER_BYTES + fragments[i].payload.nbytes + TAG_BYTES
        if chunk and (chunk_bytes + value_bytes > CHUNK_BYTES or len(chunk) == _MAX_CHUNK_KEYS):
            yield chunk
            chunk, chunk_bytes = [], 0
        chunk.append(i)
        chunk_bytes += value_bytes
    if chunk:
        yield chunk
