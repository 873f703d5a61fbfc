"""Fragments of another host's arena over the TCP connection on which they were asked for, into this process's buffers.

What came is not verified here. Knows nothing of directories or of which peer has what.
"""

from collections.abc import Iterator, Sequence

from kvstore.authenticity import FragmentAuthenticator
from kvstore.buffers import CopyBuffers
from kvstore.peer_channel import PeerChannel, in_requests
from kvstore.peer_wire import CHECK, GROUP_BYTES, PULL, TableEntry, groups
from kvstore.tiers import Rejected
from kvstore.transport import NOTHING_CAME, Pulled


class TcpTransport:
    """As Transport. Connects at once; raises OSError."""

    def __init__(self, address: str, authenticator: FragmentAuthenticator, buffers: CopyBuffers) -> None:
        """buffers: of GROUP_BYTES."""
        self._buffers = buffers
        self._channel = PeerChannel(address, authenticator)

    def pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        """As in Transport."""
        for first, part in in_requests(keys):
            for i, pulled in self._pull(part, deadline_s):
                yield first + i, pulled

    def check(self, keys: Sequence[bytes], deadline_s: float) -> None:
        """As in Transport."""
        for _, part in in_requests(keys):
            self._channel.ask(CHECK, part, deadline_s)

    def close(self) -> None:
        """As in Transport."""
        self._channel.close()

    def _pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        table = self._channel.ask(PULL, keys, deadline_s)
        yield from ((i, entry.rejected) for i, entry in enumerate(table) if entry.rejected is not None)
        pending = {i for i, entry in enumerate(table) if entry.sealed_bytes}
        try:
            for group in groups(table):
                for i, pulled in self._receive_group(group, table, deadline_s):
                    pending.discard(i)
                    yield i, pulled
        except OSError:
            yield from ((i, NOTHING_CAME) for i in pending)  # announced, and not come
            raise

    def _receive_group(
        self, group: Sequence[int], table: Sequence[TableEntry], deadline_s: float
    ) -> Iterator[tuple[int, Pulled]]:
        num_bytes = sum(table[i].sealed_bytes for i in group)
        # A fragment larger than a group travels alone; its buffer is made for it.
        buffer = self._buffers.take() if num_bytes <= GROUP_BYTES else memoryview(bytearray(num_bytes))
        body = buffer[:num_bytes]
        self._channel.receive_body(body, deadline_s)
        start = 0
        for i, (is_current, tag) in zip(group, self._channel.receive_trailers(len(group), deadline_s), strict=True):
            end = start + table[i].sealed_bytes
            yield i, Pulled(body[start:end], table[i].generation, tag, is_current)
            start = end
