"""The tier that hosts share: fragments as values in a Redis that may evict them.

A value is a whole sealed fragment (header and payload, see kvstore.format.sealing, or that compressed) and a tag that
only the cluster's secret can make (kvstore.format.authenticity), under a key with the format's version and the
secret's id. Redis forgets it when it was not written for `ttl_s`. Redis works on one value while the next is made or
verified.

A load verifies the tag alone. It covers header, checksum and payload, and is made right after the checksum, of the same
private buffer: a value whose tag fits is, bit for bit, what a writer with the secret hashed, and hashing it again would
only show whether that writer's memory failed in between. The checksum is compared where a tag does not fit, to
distinguish a fault from a forgery.

Knows nothing of leases and the directory, which live in a Redis that must not evict.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.compression import (
    LARGEST_PAYLOAD_BYTES,
    check_compression,
    compress,
    decompress,
    is_compressed,
    unseal_stored,
)
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import HEADER_BYTES, payload_bytes_at, seal_into
from kvstore.network.availability import Availability, one_line
from kvstore.redis_client import REDIS_ERRORS, address_of, connect, redirection, refused_commands
from kvstore.tiers.redis.redis_bulk import ValueBuffers, get_values, set_values

log = logging.getLogger(__name__)

KEY_PREFIX = b"switchyard:kv3:"

_MAX_CHUNK_KEYS = 1024
_FIRST_GUESS_BYTES = 256 * 1024
_NUM_WRITERS = 2  # of one store: more than two gained nothing
_LEAST_VALUES = 4  # of one of them
_MOST_HELPERS = 4  # of stores that run at once


def key_prefix_of(secret: str) -> bytes:
    """What the keys of a cluster with this secret begin with."""
    return KEY_PREFIX + FragmentAuthenticator(secret).key_id.encode() + b":"


class RedisTier:
    """A client of the Redis at `url`."""

    name = "redis"

    def __init__(
        self,
        url: str,
        secret: str,
        ttl_s: float = 3600.0,
        compression: str = "none",
        is_cluster_node: bool = False,
    ) -> None:
        """compression: of what is stored; both forms are read. is_cluster_node: no command may then have two keys."""
        self._client = connect(url)
        self._authenticator = FragmentAuthenticator(secret)
        self.key_prefix = key_prefix_of(secret)
        self._is_cluster_node = is_cluster_node
        self._redirections: dict[int, str] = {}  # HOST:PORT by slot
        self._redirections_lock = threading.Lock()
        self._ttl_ms = int(ttl_s * 1000)
        self._compresses = check_compression(compression)
        self._value_bytes = _FIRST_GUESS_BYTES  # of the value seen last: how many are asked for ahead
        self._buffers = ValueBuffers(page_at=HEADER_BYTES)
        self._num_writers = 1 if is_cluster_node else _NUM_WRITERS  # a cluster's nodes have a thread each
        self._threads = ThreadPoolExecutor(_MOST_HELPERS, "kv-redis-store")
        self._has_warned_of_refusal = False
        self._refusal = ""  # why fragments are not taken, though Redis answers
        name = f"redis tier at {address_of(self._client)}"
        self._availability = Availability(name, self._check, self._check, REDIS_ERRORS)

    @property
    def is_up(self) -> bool:
        """As in Tier."""
        return self._availability.is_up

    @property
    def problem(self) -> str:
        """As in Tier."""
        return self._availability.problem or self._refusal

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        """As in Tier. What is there already lives for another ttl_s."""
        stored = [False] * len(fragments)
        if not self.is_up or not fragments:
            return stored
        try:
            missing = self._renew(fragments, stored)
            if missing:
                self._write(fragments, missing, stored)
        except REDIS_ERRORS as error:
            self._availability.lost(error)
        return stored

    def load(self, keys: Sequence[bytes]) -> Iterator[memoryview | Rejected | None]:
        """As in Tier, one by one."""
        return self._read(keys) if self.is_up and keys else repeat(None, len(keys))

    def take_redirections(self) -> dict[int, str]:
        """The owners, as HOST:PORT, that this node of a cluster named since the last call for hash slots that are not
        its own."""
        with self._redirections_lock:
            taken, self._redirections = self._redirections, {}
        return taken

    def close(self) -> None:
        """As in Tier."""
        self._availability.close()  # a redis client must not be closed under a call in progress
        self._threads.shutdown()
        self._client.close()

    def _check(self) -> None:
        """Asks in small for all that will be asked: a user without the right to write, or a memory that is full, shows
        before a fragment is lost to it. Raises what a load would."""
        refusal = refused_commands(self._client, self.key_prefix + b"check")
        self._refusal = f"takes no fragments: {one_line(refusal)}" if refusal is not None else ""

    def _renew(self, fragments: Sequence[Fragment], stored: list[bool]) -> list[int]:
        """Marks the fragments that Redis has and gives them a new TTL; indices of the others."""
        missing: list[int] = []
        for start in range(0, len(fragments), _MAX_CHUNK_KEYS):
            keys = [self.key_prefix + fragment.key for fragment in fragments[start : start + _MAX_CHUNK_KEYS]]
            # One short command instead of many: most batches are new.
            if not self._is_cluster_node and not self._client.exists(*keys):
                missing.extend(range(start, start + len(keys)))
                continue
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.pexpire(key, self._ttl_ms)
            for i, is_there in enumerate(pipeline.execute(raise_on_error=not self._is_cluster_node), start):
                if isinstance(is_there, Exception):
                    self._refused(is_there)
                    continue
                stored[i] = bool(is_there)
                if not is_there:
                    missing.append(i)
        return missing

    def _write(self, fragments: Sequence[Fragment], missing: Sequence[int], stored: list[bool]) -> None:
        """In this thread, and in another one over a connection of its own: while a value waits for Redis in one, the
        next is made in the other. Each takes what is next, until nothing is left."""
        left = deque(missing)
        helpers: list[Future[None]] = []
        with suppress(RuntimeError):  # the tier is being closed: this thread does it all
            for _ in range(min(self._num_writers, len(missing) // _LEAST_VALUES) - 1):
                helpers.append(self._threads.submit(self._write_what_is_left, fragments, left, stored))
        try:
            self._write_what_is_left(fragments, left, stored)
        finally:  # the fragments' bytes are the caller's when this returns
            failed = [helper.exception() for helper in helpers if not helper.cancel()]
        for error in failed:
            if error is not None:
                raise error

    def _write_what_is_left(self, fragments: Sequence[Fragment], left: deque[int], stored: list[bool]) -> None:
        taken: list[int] = []

        def entries() -> Iterator[tuple[bytes, memoryview]]:
            while True:
                try:
                    taken.append(left.popleft())
                except IndexError:  # another thread took the last one
                    return
                fragment = fragments[taken[-1]]
                yield self.key_prefix + fragment.key, self._value(fragment)

        try:
            replies = set_values(self._client, entries(), self._ttl_ms)
        except BaseException:
            left.clear()  # the others need not go on
            raise
        for i, reply in zip(taken, replies, strict=True):
            stored[i] = reply is True
            if isinstance(reply, Exception):
                self._refused(reply)

    def _value(self, fragment: Fragment) -> memoryview:
        end = HEADER_BYTES + fragment.num_bytes
        value = self._buffers.take(end + TAG_BYTES)
        seal_into(value[:end], fragment.payload, fragment.key, 0)
        compressed = compress(value[:end]) if self._compresses else None
        if compressed is not None:
            end = len(compressed)
            value = value[: end + TAG_BYTES]
            value[:end] = compressed
        self._value_bytes = len(value)
        value[end:] = self._authenticator.tag(value[:end])
        return value

    def _read(self, keys: Sequence[bytes]) -> Iterator[memoryview | Rejected | None]:
        names = [self.key_prefix + key for key in keys]
        bad: list[bytes] = []
        num_given = 0
        try:
            values = get_values(self._client, names, self._buffers, self._value_bytes)
            for name, key in zip(names, keys, strict=True):
                payload = self._checked(next(values), key)
                if isinstance(payload, Rejected):
                    bad.append(name)
                if num_given + 1 == len(keys):  # the last one: there is nothing more to take
                    next(values, None)
                    self._delete(bad)
                num_given += 1
                yield payload
                del payload  # or its buffer would be in use while the next one is read
        except REDIS_ERRORS as error:
            self._availability.lost(error)
        yield from repeat(None, len(keys) - num_given)

    def _checked(self, value: memoryview | Exception | None, key: bytes) -> memoryview | Rejected | None:
        if isinstance(value, Exception):
            self._refused(value)
            return None
        if value is None:
            return None
        self._value_bytes = max(len(value), HEADER_BYTES)
        return self._verified(value, key)

    def _delete(self, names: Sequence[bytes]) -> None:
        if names:
            pipeline = self._client.pipeline(transaction=False)
            for name in names:
                pipeline.delete(name)
            pipeline.execute(raise_on_error=not self._is_cluster_node)

    def _verified(self, value: memoryview, key: bytes) -> memoryview | Rejected:
        if len(value) < TAG_BYTES:
            return Rejected("truncated")
        fragment, tag = value[:-TAG_BYTES], value[-TAG_BYTES:]
        if not self._authenticator.is_genuine(fragment, tag):
            fault = unseal_stored(fragment, key, 0)  # tells one fault from another
            return fault if isinstance(fault, Rejected) else Rejected("forged")
        if is_compressed(fragment):  # what comes out has a checksum of its own
            sealed = decompress(fragment, key, LARGEST_PAYLOAD_BYTES)
            return sealed if isinstance(sealed, Rejected) else sealed[HEADER_BYTES:]
        if len(fragment) < HEADER_BYTES:
            return Rejected("truncated")
        payload_bytes = payload_bytes_at(fragment, 0, key, 0)
        if isinstance(payload_bytes, Rejected):
            return payload_bytes
        return fragment[HEADER_BYTES:] if payload_bytes == len(fragment) - HEADER_BYTES else Rejected("truncated")

    def _refused(self, reply: Exception) -> None:
        """Redis answers but does not take fragments, for example because its memory is full and it may not evict."""
        redirected = redirection(reply)
        if redirected is not None:
            if redirected.address:
                with self._redirections_lock:
                    self._redirections[redirected.slot] = redirected.address
            return
        self._refusal = f"refuses fragments: {one_line(reply)}"
        if not self._has_warned_of_refusal:
            self._has_warned_of_refusal = True
            log.warning("redis tier at %s refuses fragments: %s", address_of(self._client), reply)
