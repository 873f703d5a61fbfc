"""One TCP connection to another host's node process, over which fragments are pulled into this process's buffers.

Nothing that the other end says is trusted: sizes are bounded, every wait has an end, and what does not fit closes the
connection. What came is not verified here. Knows nothing of directories or of which peer has what.
"""

import socket
import time
from collections.abc import Iterator, Sequence

from kvstore.authenticity import FragmentAuthenticator
from kvstore.buffers import CopyBuffers
from kvstore.peer_wire import (
    CHECK,
    GROUP_BYTES,
    HEAD_BYTES,
    HELLO_BYTES,
    MAX_KEYS,
    PULL,
    TRAILER_BYTES,
    ProtocolError,
    TableEntry,
    groups,
    pack_request,
    receive,
    receive_exactly,
    send_pieces,
    table_bytes,
    tune,
    unpack_head,
    unpack_hello,
    unpack_table,
    unpack_trailer,
)
from kvstore.tiers import Rejected
from kvstore.transport import Pulled

_CONNECT_S = 1.0


class TcpTransport:
    """As Transport. Connects at once; raises OSError."""

    def __init__(self, address: str, authenticator: FragmentAuthenticator, buffers: CopyBuffers) -> None:
        """buffers: of GROUP_BYTES."""
        self._authenticator = authenticator
        self._buffers = buffers
        self._sequence = 0
        self._connection = _connect(address)
        try:
            tune(self._connection)
            self._challenge = unpack_hello(
                receive_exactly(self._connection, HELLO_BYTES, time.monotonic() + _CONNECT_S)
            )
        except BaseException:
            self._connection.close()
            raise

    def pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        """As in Transport."""
        for first in range(0, len(keys), MAX_KEYS):
            for i, pulled in self._pull(keys[first : first + MAX_KEYS], deadline_s):
                yield first + i, pulled

    def check(self, keys: Sequence[bytes], deadline_s: float) -> None:
        """As in Transport."""
        for first in range(0, len(keys), MAX_KEYS):
            self._ask(CHECK, keys[first : first + MAX_KEYS], deadline_s)

    def close(self) -> None:
        """As in Transport."""
        self._connection.close()

    def _pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        table = self._ask(PULL, keys, deadline_s)
        yield from ((i, entry.rejected) for i, entry in enumerate(table) if entry.rejected is not None)
        pending = {i for i, entry in enumerate(table) if entry.sealed_bytes}
        try:
            for group in groups(table):
                for i, pulled in self._receive_group(group, table, deadline_s):
                    pending.discard(i)
                    yield i, pulled
        except OSError:
            for i in pending:  # announced, and not come
                yield i, Pulled(memoryview(b""), table[i].generation, b"", True)
            raise

    def _ask(self, kind: int, keys: Sequence[bytes], deadline_s: float) -> list[TableEntry]:
        self._connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        request = pack_request(self._sequence, kind, keys)
        send_pieces(self._connection, [request, self._authenticator.tag(self._challenge + request)])
        head = receive_exactly(self._connection, HEAD_BYTES, deadline_s)
        if unpack_head(head, self._sequence) != (kind, len(keys)):
            raise ProtocolError("a table for another request")
        num_keys = len(keys)
        self._sequence += 1
        return unpack_table(receive_exactly(self._connection, table_bytes(num_keys), deadline_s), num_keys)

    def _receive_group(
        self, group: Sequence[int], table: Sequence[TableEntry], deadline_s: float
    ) -> Iterator[tuple[int, Pulled]]:
        num_bytes = sum(table[i].sealed_bytes for i in group)
        # A fragment larger than a group travels alone; its buffer is made for it.
        buffer = self._buffers.take() if num_bytes <= GROUP_BYTES else memoryview(bytearray(num_bytes))
        body = buffer[:num_bytes]
        if receive(self._connection, body, deadline_s) < num_bytes:
            raise ProtocolError("the other end is gone, or too slow")
        trailers = memoryview(receive_exactly(self._connection, TRAILER_BYTES * len(group), deadline_s))
        start = 0
        for place, i in enumerate(group):
            end = start + table[i].sealed_bytes
            is_current, tag = unpack_trailer(trailers, place)
            yield i, Pulled(body[start:end], table[i].generation, tag, is_current)
            start = end


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host, int(port)), _CONNECT_S)
    except (ValueError, OverflowError) as error:  # the directory's word is not trusted either
        raise ProtocolError(f"not an address: {address[:100]!r}") from error
