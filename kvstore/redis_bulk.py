"""Large values to and from a Redis without copies in between: what a client library does piece by piece, on one of its
connections.

A value goes out from where it lies, and comes in right where it is to stay. Knows nothing of what values
are.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from kvstore.buffers import CopyBuffers
from kvstore.redis_client import RedisClient, RedisRefusal, borrowed_connection

_SIZE_STEP_BYTES = 16 * 1024  # values differ little: those of one model have a few sizes
_LINE_BYTES = 4096  # read at once where a line is due; what belongs to the value behind it is copied
_MAX_UNREAD = 1024  # replies that Redis keeps for us
_LONGEST_VALUE = 512 * 1024 * 1024  # Redis's own bound


def set_values(
    client: RedisClient, entries: Iterable[tuple[bytes, memoryview]], ttl_ms: int
) -> list[bool | RedisRefusal]:
    """SET of each key. An entry is asked for when the one before is on its way: Redis works while it is made.

    Raises what kvstore.redis_client.REDIS_ERRORS has.
    """
    replies: list[bool | RedisRefusal] = []
    num_sent = 0
    with borrowed_connection(client) as (connection, stream):
        reader = _Reader(stream)
        for key, value in entries:
            head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
            ttl = b"%d" % ttl_ms
            _send(connection, [head, value, b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl)])
            num_sent += 1
            if num_sent - len(replies) == _MAX_UNREAD:
                replies.append(reader.status())
        replies += [reader.status() for _ in range(num_sent - len(replies))]
    return replies


def get_values(
    client: RedisClient, keys: Sequence[bytes], chunk_keys: int, buffers: "ValueBuffers"
) -> Iterator[memoryview | None]:
    """MGETs of chunk_keys keys each; a private, writable copy for each key, in order.

    The next MGET is sent before the values of one are read: Redis works while they are used. Raises as set_values, and
    RedisRefusal.
    """
    chunks = [keys[i : i + chunk_keys] for i in range(0, len(keys), chunk_keys)]
    with borrowed_connection(client) as (connection, stream):
        reader = _Reader(stream)
        _send(connection, [_mget(chunks[0])])
        for chunk, following in zip_longest(chunks, chunks[1:]):
            if following:
                _send(connection, [_mget(following)])
            if reader.length(b"*") != len(chunk):
                raise OSError("a reply of another length than was asked for")
            for _ in chunk:
                yield reader.value(buffers)


def get_each(
    client: RedisClient, keys: Sequence[bytes], chunk_keys: int, buffers: "ValueBuffers"
) -> Iterator[memoryview | RedisRefusal | None]:
    """As get_values, by a GET for each key: to a node of a cluster, which refuses keys of other nodes one by one."""
    chunks = [keys[i : i + chunk_keys] for i in range(0, len(keys), chunk_keys)]
    with borrowed_connection(client) as (connection, stream):
        reader = _Reader(stream)
        _send(connection, [_gets(chunks[0])])
        for chunk, following in zip_longest(chunks, chunks[1:]):
            if following:
                _send(connection, [_gets(following)])
            for _ in chunk:
                try:
                    value: memoryview | RedisRefusal | None = reader.value(buffers)
                except RedisRefusal as refusal:  # a line of its own: the next reply follows
                    value = refusal
                yield value


def _send(connection: Any, pieces: list[bytes | memoryview]) -> None:
    # The library's own PING would read the first reply that waits for us.
    connection.send_packed_command(pieces, check_health=False)


def _gets(keys: Sequence[bytes]) -> bytes:
    return b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys)


def _mget(keys: Sequence[bytes]) -> bytes:
    arguments = [b"$%d\r\n%b\r\n" % (len(key), key) for key in keys]
    return b"*%d\r\n$4\r\nMGET\r\n" % (len(keys) + 1) + b"".join(arguments)


class ValueBuffers:
    """Buffers for values of all sizes. Thread-safe. page_at: as in CopyBuffers."""

    def __init__(self, page_at: int = 0) -> None:
        self._page_at = page_at
        self._by_bytes: dict[int, CopyBuffers] = {}

    def take(self, num_bytes: int) -> memoryview:
        """As CopyBuffers.take."""
        size = -(-num_bytes // _SIZE_STEP_BYTES) * _SIZE_STEP_BYTES
        buffers = self._by_bytes.get(size)
        if buffers is None:
            buffers = self._by_bytes.setdefault(
                size, CopyBuffers(size, kept_bytes=64 * 1024 * 1024, page_at=self._page_at)
            )
        return buffers.take()[:num_bytes]


class _Reader:
    """Replies of the Redis protocol, version 2."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(_LINE_BYTES))
        self._start = 0
        self._end = 0

    def status(self) -> bool | RedisRefusal:
        """Of a SET."""
        line = self._line()
        if line.startswith(b"-"):
            return RedisRefusal(line[1:].decode(errors="replace"))
        return line == b"+OK"

    def length(self, kind: bytes) -> int:
        """Of an array (b"*") or a value (b"$") that follows; -1: there is none."""
        line = self._line()
        if line.startswith(b"-"):
            raise RedisRefusal(line[1:].decode(errors="replace"))
        try:
            length = int(line[1:])
        except ValueError:
            length = -2
        if not line.startswith(kind) or not -1 <= length <= _LONGEST_VALUE:
            raise OSError("not a reply that is due")
        return length

    def value(self, buffers: ValueBuffers) -> memoryview | None:
        """A private copy; None where there is none."""
        num_bytes = self.length(b"$")
        if num_bytes < 0:
            return None
        target = buffers.take(num_bytes + 2)
        have = min(len(target), self._end - self._start)
        target[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while have < len(target):
            have += self._receive(target[have:])
        return target[:num_bytes]

    def _line(self) -> bytes:
        while True:
            held = bytes(self._buffer[self._start : self._end])
            line, found, _ = held.partition(b"\r\n")
            if found:
                self._start += len(line) + 2
                return line
            if len(held) == _LINE_BYTES:
                raise OSError("a line without an end")
            self._buffer[: len(held)] = held
            self._start, self._end = 0, len(held)
            self._end += self._receive(self._buffer[self._end :])

    def _receive(self, target: memoryview) -> int:
        count: int = self._stream.recv_into(target)
        if count == 0:
            raise ConnectionResetError("the server closed the connection")
        return count
