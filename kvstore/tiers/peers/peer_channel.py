"""One authenticated TCP connection to another host's node process: requests about fragments, and the answers.

No answer is trusted: sizes are bounded, every wait has an end, and what does not fit closes the
connection. Knows nothing of how the fragments' bytes travel.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.fragment import Rejected
from kvstore.network.addresses import split_host_port
from kvstore.tiers.peers.peer_wire import (
    CHECK,
    DESCRIBE,
    DESCRIPTION_HEAD_BYTES,
    HEAD_BYTES,
    HELLO_BYTES,
    MAX_KEYS,
    TRAILER_BYTES,
    ProtocolError,
    TableEntry,
    pack_head,
    pack_request,
    receive,
    receive_exactly,
    send_pieces,
    table_bytes,
    tune,
    unpack_description_head,
    unpack_head,
    unpack_hello,
    unpack_table,
    unpack_trailer,
)
from kvstore.tiers.peers.transport import NOTHING_CAME, Pulled

_CONNECT_S = 1.0

Bodies: TypeAlias = Iterator[tuple[Sequence[int], memoryview]]
"""(A group of a table's fragments, a private copy of their headers and payloads one behind the other); the group's
trailers are what the connection has next."""


class PeerChannel:
    """Connects at once; raises OSError, as all of its methods do. Of no use after that. deadline_s: monotonic."""

    def __init__(self, address: str, authenticator: FragmentAuthenticator) -> None:
        self._authenticator = authenticator
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

    def pull(
        self, kind: int, keys: Sequence[bytes], deadline_s: float, bodies: Callable[[Sequence[TableEntry]], Bodies]
    ) -> Iterator[tuple[int, Pulled | Rejected]]:
        """As Transport.pull. bodies: how the fragments come that a table tells of, group by group."""
        for first, part in _in_requests(keys):
            table = self._ask(kind, part, deadline_s)
            yield from ((first + i, entry.rejected) for i, entry in enumerate(table) if entry.rejected is not None)
            pending = {i for i, entry in enumerate(table) if entry.sealed_bytes}
            try:
                for group, body in bodies(table):
                    start = 0
                    for i, (is_current, tag) in zip(group, self._receive_trailers(len(group), deadline_s), strict=True):
                        end = start + table[i].sealed_bytes
                        pending.discard(i)
                        yield first + i, Pulled(body[start:end], table[i].generation, tag, is_current)
                        start = end
            except OSError:
                yield from ((first + i, NOTHING_CAME) for i in pending)  # announced, and not come
                raise

    def check(self, keys: Sequence[bytes], deadline_s: float) -> None:
        """As Transport.check."""
        for _, part in _in_requests(keys):
            self._ask(CHECK, part, deadline_s)

    def describe(self) -> bytes:
        """How the peer's memory is read from elsewhere, in its own words; empty when it is not to be."""
        deadline_s = time.monotonic() + _CONNECT_S
        self._send_request(DESCRIBE, [], deadline_s)
        num_bytes, tag = unpack_description_head(self.receive_exactly(DESCRIPTION_HEAD_BYTES, deadline_s))
        description = bytes(self.receive_exactly(num_bytes, deadline_s))
        # Native code will take it apart: it must be the peer's own, and made for this connection.
        if not self._authenticator.is_genuine(memoryview(self._challenge + description), tag):
            raise ProtocolError("a description without the cluster's secret")
        self._sequence += 1
        return description

    def tell_read(self, kind: int, num_fragments: int) -> None:
        """That a group of the last table's fragments was read from the peer's memory."""
        send_pieces(self._connection, [pack_head(self._sequence - 1, kind, num_fragments)])

    def receive_body(self, target: memoryview, deadline_s: float) -> None:
        """Fills the target with what the peer sends."""
        if receive(self._connection, target, deadline_s) < len(target):
            raise ProtocolError("the other end is gone, or too slow")

    def receive_exactly(self, num_bytes: int, deadline_s: float) -> bytearray:
        """So many bytes of what the peer sends."""
        return receive_exactly(self._connection, num_bytes, deadline_s)

    def close(self) -> None:
        """Gives up the connection."""
        self._connection.close()

    def _ask(self, kind: int, keys: Sequence[bytes], deadline_s: float) -> list[TableEntry]:
        """The table that answers a request about at most MAX_KEYS fragments."""
        self._send_request(kind, keys, deadline_s)
        table = unpack_table(self.receive_exactly(table_bytes(len(keys)), deadline_s), len(keys))
        self._sequence += 1
        return table

    def _receive_trailers(self, num_fragments: int, deadline_s: float) -> list[tuple[bool, bytes]]:
        """For each fragment of a group whether its slot was still its own, and its tag."""
        raw = memoryview(self.receive_exactly(TRAILER_BYTES * num_fragments, deadline_s))
        return [unpack_trailer(raw, index) for index in range(num_fragments)]

    def _send_request(self, kind: int, keys: Sequence[bytes], deadline_s: float) -> None:
        """Sends it, and takes the head of its answer."""
        self._connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        request = pack_request(self._sequence, kind, keys)
        send_pieces(self._connection, [request, self._authenticator.tag(self._challenge + request)])
        if unpack_head(self.receive_exactly(HEAD_BYTES, deadline_s), self._sequence) != (kind, len(keys)):
            raise ProtocolError("an answer to another request")


def _in_requests(keys: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Parts of the keys that fit into a request each, behind the index of their first."""
    for first in range(0, len(keys), MAX_KEYS):
        yield first, keys[first : first + MAX_KEYS]


def _connect(address: str) -> socket.socket:
    try:
        host, port = split_host_port(address)
        return socket.create_connection((host, port), _CONNECT_S)
    except ValueError as error:  # the directory's word is not trusted either
        raise ProtocolError(f"not an address: {address[:100]!r}") from error
