"""The wire protocol by which one host pulls fragments from another's arena, over TCP. Little-endian.

    server  hello     magic, challenge                           once per connection
    client  request   magic, sequence, kind, number of keys, keys, tag over challenge and all of it
    server  table     magic, sequence, kind, number of keys; for each its bytes and its slot's generation, or 0 bytes
                      and 0: not here, or 0 bytes and a number: found bad, and why
            group     sealed fragments, one behind the other, as they lie in the arena
            trailer   for each of the group: whether its slot still had that generation after it was sent, and a tag
            ...       groups and trailers until all of the table is sent

Of kind CHECK are requests about fragments that came and were bad: the server verifies them and sends none of them.
A reader that has a way of its own to the server's memory asks DESCRIBE (no keys) once, and READ in place of PULL:

    server  description   its length, a tag over challenge and description, and what a reader needs to know; or 0 bytes
    server  table         as above; then for each key the address of its slot's header, or 0
    client  read          magic, sequence, kind, number of fragments: it has read the next group
    server  trailer       as above
            ...           reads and trailers, group by group

The tags are those of kvstore.format.authenticity: a request's shows that the caller knows the cluster's secret, a
fragment's that the sender does. Whatever does not fit ends the connection. Bytes are not encrypted: the network must be
private. Knows nothing of arenas, directories or threads.
"""

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.format.authenticity import TAG_BYTES
from kvstore.format.fragment import Rejected, RejectReason
from kvstore.format.sealing import HEADER_BYTES
from kvstore.names import FRAGMENT_KEY_BYTES

MAX_KEYS = 4096  # of a request
MAX_FRAGMENT_BYTES = 64 * 1024 * 1024
GROUP_BYTES = 2 * 1024 * 1024
_MAX_GROUP = 256  # fragments; sendmsg takes 1024 pieces at most
_MAGIC = b"SYpeer1\0"
_CHALLENGE_BYTES = 16
_STALL_S = 1.0  # without a single byte, where bytes are due

_HELLO = struct.Struct(f"<8s{_CHALLENGE_BYTES}s")
_HEAD = struct.Struct("<8sQII")
_TRAILER = struct.Struct(f"<B{TAG_BYTES}s")
_DESCRIPTION = struct.Struct(f"<I{TAG_BYTES}s")
_MAX_DESCRIPTION_BYTES = 1024 * 1024
HELLO_BYTES = _HELLO.size
HEAD_BYTES = _HEAD.size
TRAILER_BYTES = _TRAILER.size
DESCRIPTION_HEAD_BYTES = _DESCRIPTION.size

Bytes = bytes | bytearray | memoryview


PULL = 0
CHECK = 1
DESCRIBE = 2
READ = 3
_KINDS = (PULL, CHECK, DESCRIBE, READ)
_REASONS: tuple[RejectReason, ...] = ("checksum", "stale", "truncated", "layout", "forged")


class ProtocolError(OSError):
    """The other end says what it must not say."""


@dataclass(frozen=True, slots=True)
class TableEntry:
    """What the server has of one key."""

    sealed_bytes: int
    """Header and payload; 0: it is not here."""
    generation: int

    @classmethod
    def absent(cls) -> "TableEntry":
        """It has not got it."""
        return cls(0, 0)

    @classmethod
    def bad(cls, rejected: Rejected) -> "TableEntry":
        """It had it, and found it bad."""
        return cls(0, 1 + _REASONS.index(rejected.reason))

    @property
    def rejected(self) -> Rejected | None:
        """Why the server found it bad."""
        return Rejected(_REASONS[self.generation - 1]) if not self.sealed_bytes and self.generation else None


def tune(connection: socket.socket) -> None:
    """No waiting for more to send. Sizes of buffers are left alone: the kernel adapts those that are not set."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def pack_hello(challenge: bytes) -> bytes:
    """challenge: fresh random bytes."""
    return _HELLO.pack(_MAGIC, challenge)


def unpack_hello(raw: Bytes) -> bytes:
    """The challenge. Raises ProtocolError."""
    magic, challenge = _HELLO.unpack(raw)
    if magic != _MAGIC:
        raise ProtocolError("not a peer of this version")
    return bytes(challenge)


def pack_request(sequence: int, kind: int, keys: Sequence[bytes]) -> bytes:
    """Without its tag."""
    return pack_head(sequence, kind, len(keys)) + b"".join(keys)


def pack_head(sequence: int, kind: int, num_keys: int) -> bytes:
    """Of a request, a table, or the word that a group was read."""
    return _HEAD.pack(_MAGIC, sequence, kind, num_keys)


def unpack_head(raw: Bytes, sequence: int) -> tuple[int, int]:
    """Kind, and number of keys of the request or table that follows. Raises ProtocolError."""
    magic, held_sequence, kind, num_keys = _HEAD.unpack(raw)
    if magic != _MAGIC or held_sequence != sequence or kind not in _KINDS:
        raise ProtocolError("not the message that is due")
    if num_keys > MAX_KEYS or (num_keys == 0) != (kind == DESCRIBE):
        raise ProtocolError(f"{num_keys} keys in a message")
    return int(kind), int(num_keys)


def split_keys(raw: bytes) -> list[bytes]:
    """The keys of a request."""
    return [raw[i : i + FRAGMENT_KEY_BYTES] for i in range(0, len(raw), FRAGMENT_KEY_BYTES)]


def pack_table(sequence: int, kind: int, table: Sequence[TableEntry]) -> bytes:
    """With its head."""
    sizes = [entry.sealed_bytes for entry in table]
    generations = [entry.generation for entry in table]
    numbers = struct.pack(f"<{len(table)}I{len(table)}Q", *sizes, *generations)
    return pack_head(sequence, kind, len(table)) + numbers


def table_bytes(num_keys: int) -> int:
    """Of a table behind its head."""
    return 12 * num_keys


def unpack_table(raw: Bytes, num_keys: int) -> list[TableEntry]:
    """Raises ProtocolError for sizes that no fragment has."""
    numbers = struct.unpack(f"<{num_keys}I{num_keys}Q", raw)
    table = [TableEntry(*pair) for pair in zip(numbers[:num_keys], numbers[num_keys:], strict=True)]
    if any(entry.sealed_bytes and not HEADER_BYTES <= entry.sealed_bytes <= MAX_FRAGMENT_BYTES for entry in table):
        raise ProtocolError("a size that no fragment has")
    if any(not entry.sealed_bytes and entry.generation > len(_REASONS) for entry in table):
        raise ProtocolError("a reason that there is not")
    return table


def pack_addresses(addresses: Sequence[int]) -> bytes:
    """One for each key of a table."""
    return struct.pack(f"<{len(addresses)}Q", *addresses)


def address_bytes(num_keys: int) -> int:
    """Of the addresses behind a table."""
    return 8 * num_keys


def unpack_addresses(raw: Bytes, num_keys: int) -> tuple[int, ...]:
    """One for each key of a table."""
    return struct.unpack(f"<{num_keys}Q", raw)


def pack_description(description: bytes, tag: bytes) -> bytes:
    """Of the server's memory, with its head."""
    return _DESCRIPTION.pack(len(description), tag) + description


def unpack_description_head(raw: Bytes) -> tuple[int, bytes]:
    """Bytes of the description that follows, and its tag. Raises ProtocolError."""
    num_bytes, tag = _DESCRIPTION.unpack(raw)
    if num_bytes > _MAX_DESCRIPTION_BYTES:
        raise ProtocolError("a size that no description has")
    return num_bytes, tag


def groups(table: Sequence[TableEntry]) -> Iterator[list[int]]:
    """Which fragments travel together: indices into the table, the same at both ends."""
    group: list[int] = []
    group_bytes = 0
    for i, entry in enumerate(table):
        if not entry.sealed_bytes:
            continue
        if group and (group_bytes + entry.sealed_bytes > GROUP_BYTES or len(group) == _MAX_GROUP):
            yield group
            group, group_bytes = [], 0
        group.append(i)
        group_bytes += entry.sealed_bytes
    if group:
        yield group


def pack_trailer(is_current: bool, tag: bytes) -> bytes:
    """Of one fragment."""
    return _TRAILER.pack(is_current, tag)


def unpack_trailer(raw: memoryview, index: int) -> tuple[bool, bytes]:
    """Of one fragment of a group: whether its slot was still its own, and its tag."""
    is_current, tag = _TRAILER.unpack_from(raw, index * TRAILER_BYTES)
    return is_current == 1, tag


def receive(connection: socket.socket, target: memoryview, deadline_s: float) -> int:
    """Fills the target; how many bytes came before the other end closed, stalled or was late. deadline_s: monotonic."""
    num_received = 0
    while num_received < len(target):
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            break
        connection.settimeout(min(remaining_s, _STALL_S))
        try:
            count = connection.recv_into(target[num_received:])
        except TimeoutError:
            break
        if count == 0:
            break
        num_received += count
    return num_received


def receive_exactly(connection: socket.socket, num_bytes: int, deadline_s: float) -> bytearray:
    """Raises ProtocolError when they do not all come in time."""
    raw = bytearray(num_bytes)
    if receive(connection, memoryview(raw), deadline_s) < num_bytes:
        raise ProtocolError("the other end is gone, or too slow")
    return raw


def send_pieces(connection: socket.socket, pieces: Sequence[bytes | memoryview]) -> None:
    """Sends the pieces from where they lie, one behind the other; the socket's timeout is for each step."""
    waiting = [memoryview(piece) for piece in pieces]
    while waiting:
        num_sent = connection.sendmsg(waiting)
        while waiting and num_sent >= len(waiting[0]):
            num_sent -= len(waiting.pop(0))
        if waiting and num_sent:
            waiting[0] = waiting[0][num_sent:]
