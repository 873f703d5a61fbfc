"""Large values to and from a Redis without copies in between, on a connection of a client library.

A value is sent from its own memory and received into its destination. Redis always has a few to work on, never many:
what waits in its sockets leaves the processor's caches, and costs it twice the time. Knows nothing of what values are.
"""

import socket
import ssl
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvstore.format.buffers import CopyBuffers
from kvstore.redis_client import RedisClient, RedisRefusal, borrowed_connection

_SIZE_STEP_BYTES = 16 * 1024  # values differ little: those of one model have a few sizes
_LINE_BYTES = 4096  # read at once where a line is due; what belongs to the value behind it is copied
_MAX_UNREAD = 1024  # replies that Redis keeps for us
_WINDOW_BYTES = 768 * 1024  # of values on their way, that is two of 256 KiB with their headers; two at least
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds
_LONGEST_VALUE = 512 * 1024 * 1024  # Redis's own bound


def set_values(
    client: RedisClient, entries: Iterable[tuple[bytes, memoryview]], ttl_ms: int
) -> list[bool | RedisRefusal]:
    """SET of each key. An entry is asked for when the one before is on its way: Redis works while it is made.

    Raises what kvstore.redis_client.REDIS_ERRORS has.
    """
    replies: list[bool | RedisRefusal] = []
    unread: deque[int] = deque()  # sizes of what is on its way
    unread_bytes = 0
    with _bulk_stream(client) as stream:
        reader = _Reader(stream)
        for key, value in entries:
            while (len(unread) > 1 and unread_bytes + len(value) > _WINDOW_BYTES) or len(unread) == _MAX_UNREAD:
                replies.append(reader.status())
                unread_bytes -= unread.popleft()
            _send(stream, [_set_head(key, ttl_ms, len(value)), value, b"\r\n"])
            unread.append(len(value))
            unread_bytes += len(value)
            del value  # or its buffer would be in use while the next one is made
        replies += [reader.status() for _ in unread]
    return replies


def get_values(
    client: RedisClient, keys: Sequence[bytes], buffers: "ValueBuffers", value_bytes: int
) -> Iterator[memoryview | RedisRefusal | None]:
    """GET of each key; a private, writable copy for each, in order. value_bytes: how large they may well be.

    The next ones are asked for before one is read: Redis works while it is used. One by one, not by MGET, whose reply
    Redis makes whole before it sends any. Raises as set_values.
    """
    window = max(2, min(_MAX_UNREAD, _WINDOW_BYTES // value_bytes))
    num_asked = 0
    with _bulk_stream(client) as stream:
        reader = _Reader(stream)
        for num_read in range(len(keys)):
            if num_asked < len(keys) and num_asked - num_read <= window // 2:
                wanted = keys[num_asked : num_read + window]
                num_asked += len(wanted)
                _send(stream, [_gets(wanted)])
            try:
                value: memoryview | RedisRefusal | None = reader.value(buffers)
            except RedisRefusal as refusal:  # a line of its own: the next reply follows
                value = refusal
            yield value
            del value  # or its buffer would be in use while the next one is read


@contextmanager
def _bulk_stream(client: RedisClient) -> Iterator[Any]:
    """The socket of one of the client's connections.

    Python asks before each call on a socket with a timeout whether it would have to wait, and a call ends with what is
    there or fits. So a plain socket is a blocking one meanwhile, and the kernel keeps its timeouts: a value is sent or
    received by one call.
    """
    with borrowed_connection(client) as (_, stream):
        timeout_s = stream.gettimeout()
        if isinstance(stream, ssl.SSLSocket) or timeout_s is None:
            yield stream
            return
        limit = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6))
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        stream.settimeout(None)
        yield stream
        stream.settimeout(timeout_s)  # after an error it is closed


def _send(stream: Any, pieces: list[bytes | memoryview]) -> None:
    """In one system call where that takes them all."""
    num_sent = 0 if isinstance(stream, ssl.SSLSocket) else stream.sendmsg(pieces)
    for piece in pieces:
        if num_sent < len(piece):
            stream.sendall(memoryview(piece)[num_sent:])
        num_sent = max(0, num_sent - len(piece))


def _set_head(key: bytes, ttl_ms: int, num_bytes: int) -> bytes:
    """What comes before the value. PSETEX: the value is the last argument, and Redis has the command when it has it."""
    ttl = b"%d" % ttl_ms
    return b"*4\r\n$6\r\nPSETEX\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(ttl), ttl, num_bytes)


def _gets(keys: Sequence[bytes]) -> bytes:
    return b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys)


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
        self._whole = 0 if isinstance(stream, ssl.SSLSocket) else socket.MSG_WAITALL
        self._buffer = memoryview(bytearray(_LINE_BYTES))
        self._start = 0
        self._end = 0

    def status(self) -> bool | RedisRefusal:
        """Of a SET."""
        line = self._line()
        if line.startswith(b"-"):
            return RedisRefusal(line[1:].decode(errors="replace"))
        return line == b"+OK"

    def length(self) -> int:
        """Of a value that follows; -1: there is none."""
        line = self._line()
        if line.startswith(b"-"):
            raise RedisRefusal(line[1:].decode(errors="replace"))
        try:
            length = int(line[1:])
        except ValueError:
            length = -2
        if not line.startswith(b"$") or not -1 <= length <= _LONGEST_VALUE:
            raise OSError("not a reply that is due")
        return length

    def value(self, buffers: ValueBuffers) -> memoryview | None:
        """A private copy; None where there is none."""
        num_bytes = self.length()
        if num_bytes < 0:
            return None
        target = buffers.take(num_bytes + 2)
        have = min(len(target), self._end - self._start)
        target[:have] = self._buffer[self._start : self._start + have]
        self._start += have
        while have < len(target):
            have += self._receive(target[have:], self._whole)
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

    def _receive(self, target: memoryview, flags: int = 0) -> int:
        count: int = self._stream.recv_into(target, 0, flags)
        if count == 0:
            raise ConnectionResetError("the server closed the connection")
        return count
