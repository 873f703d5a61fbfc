"""Fragments of another host's arena over the TCP connection on which they were asked for, into this process's buffers.

What came is not verified here. Knows nothing of directories or of which peer has what.
"""

from collections.abc import Iterator, Sequence

from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.buffers import CopyBuffers
from kvstore.format.fragment import Rejected
from kvstore.tiers.peers.peer_channel import Bodies, PeerChannel
from kvstore.tiers.peers.peer_wire import GROUP_BYTES, PULL, TableEntry, groups
from kvstore.tiers.peers.transport import Pulled


class TcpTransport:
    """As Transport. Connects at once; raises OSError."""

    def __init__(self, address: str, authenticator: FragmentAuthenticator, buffers: CopyBuffers) -> None:
        """buffers: of GROUP_BYTES."""
        self._buffers = buffers
        self._channel = PeerChannel(address, authenticator)

    def pull(self, keys: Sequence[bytes], deadline_s: float) -> Iterator[tuple[int, Pulled | Rejected]]:
        """As in Transport."""
        return self._channel.pull(PULL, keys, deadline_s, lambda table: self._bodies(table, deadline_s))

    def check(self, keys: Sequence[bytes], deadline_s: float) -> None:
        """As in Transport."""
        self._channel.check(keys, deadline_s)

    def close(self) -> None:
        """As in Transport."""
        self._channel.close()

    def _bodies(self, table: Sequence[TableEntry], deadline_s: float) -> Bodies:
        for group in groups(table):
            num_bytes = sum(table[i].sealed_bytes for i in group)
            # A fragment larger than a group travels alone; its buffer is made for it.
            buffer = self._buffers.take() if num_bytes <= GROUP_BYTES else memoryview(bytearray(num_bytes))
            body = buffer[:num_bytes]
            self._channel.receive_body(body, deadline_s)
            yield group, body
