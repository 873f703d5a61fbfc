"""Serves the fragments of a node's arena, and of the disk behind it, to other hosts over TCP; runs in the node process.

A thread for each connection, which sends straight from the arena's mapping. A slot may be reused while it is sent: the
trailer reports that, and the sent bytes then fail their checksum or name another fragment. Callers that read from the
arena by themselves get its location, and the trailers when they have read it. Knows nothing of callers, but that they
know the cluster's secret.
"""

import logging
import os
import select
import socket
import time
from collections.abc import Sequence

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.fragment import Rejected
from kvstore.format.sealing import generation_at
from kvstore.names import FRAGMENT_KEY_BYTES
from kvstore.network.acceptor import Acceptor
from kvstore.network.addresses import join_host_port, listen, split_host_port
from kvstore.node.node_slots import NodeSlots
from kvstore.tiers.peers.peer_wire import (
    CHECK,
    DESCRIBE,
    HEAD_BYTES,
    READ,
    ProtocolError,
    TableEntry,
    groups,
    pack_addresses,
    pack_description,
    pack_head,
    pack_hello,
    pack_table,
    pack_trailer,
    receive_exactly,
    send_pieces,
    split_keys,
    tune,
    unpack_head,
)
from kvstore.tiers.peers.transport import ReadableMemory

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 128
_IDLE_S = 120.0  # until a connection without requests is closed
_STEP_S = 5.0  # for a request to come whole, and for the other end to take some bytes
_PROGRESS_S = 0.0001  # between looks after a reader, on this side of its reads


class PeerServer:
    """Listens from the start. Raises OSError when it cannot, ValueError for an address that is none."""

    def __init__(self, address: str, slots: NodeSlots, secret: str, memory: ReadableMemory | None = None) -> None:
        """memory: the arena of the slots, where callers may read from it by themselves."""
        host, port = split_host_port(address)
        self._slots = slots
        self._memory = memory
        self._authenticator = FragmentAuthenticator(secret)
        listener = listen(host, port, backlog=64)
        self.address = join_host_port(host, listener.getsockname()[1])
        """With the port that it really got."""
        self._acceptor = Acceptor(listener, self._serve, "kv-peer", _MAX_CONNECTIONS)

    def close(self) -> None:
        """Ends all connections."""
        self._acceptor.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._converse(connection)
        except OSError as error:
            log.debug("connection of a peer ended: %s", error)

    def _converse(self, connection: socket.socket) -> None:
        tune(connection)
        challenge = os.urandom(16)
        connection.settimeout(_STEP_S)
        connection.sendall(pack_hello(challenge))
        sequence = 0
        while True:
            connection.settimeout(_IDLE_S)
            if not connection.recv(1, socket.MSG_PEEK):
                return
            deadline_s = time.monotonic() + _STEP_S
            head = receive_exactly(connection, HEAD_BYTES, deadline_s)
            kind, num_keys = unpack_head(head, sequence)
            raw = receive_exactly(connection, num_keys * FRAGMENT_KEY_BYTES + TAG_BYTES, deadline_s)
            keys, tag = raw[:-TAG_BYTES], memoryview(raw)[-TAG_BYTES:]
            if not self._authenticator.is_genuine(memoryview(challenge + head + keys), tag):
                raise ProtocolError("a request without the cluster's secret")
            connection.settimeout(_STEP_S)
            if kind == CHECK:
                self._slots.check(split_keys(bytes(keys)))
                send_pieces(connection, [pack_table(sequence, kind, [TableEntry.absent()] * num_keys)])
            elif kind == DESCRIBE:
                description = self._memory.description if self._memory is not None else b""
                proof = self._authenticator.tag(challenge + description)
                send_pieces(connection, [pack_head(sequence, kind, 0), pack_description(description, proof)])
            else:
                self._answer(connection, sequence, kind, split_keys(bytes(keys)))
            sequence += 1

    def _answer(self, connection: socket.socket, sequence: int, kind: int, keys: Sequence[bytes]) -> None:
        views: list[memoryview | None] = []
        table: list[TableEntry] = []
        refs = self._slots.lookup(keys)
        for key, ref in zip(keys, refs, strict=True):
            view = self._slots.view(key, ref) if ref.slot >= 0 else None
            views.append(view if isinstance(view, memoryview) else None)
            if isinstance(view, Rejected):
                table.append(TableEntry.bad(view))
            else:
                table.append(TableEntry.absent() if view is None else TableEntry(len(view), ref.generation))
        memory = self._memory_for(kind)
        addresses = [] if memory is None else [memory.address_of(ref.slot) if ref.slot >= 0 else 0 for ref in refs]
        send_pieces(connection, [pack_table(sequence, kind, table), pack_addresses(addresses)])
        for group in groups(table):
            sent = [view for i in group if (view := views[i]) is not None]
            if memory is None:
                send_pieces(connection, sent)
            tags = [self._authenticator.tag(view) for view in sent]  # while the other end takes what was sent, or reads
            if memory is not None:
                _await_read(connection, sequence, len(group), memory)
            # Last of all: a slot that is still its own now was so while it was sent.
            are_current = [generation_at(view, 0) == table[i].generation for i, view in zip(group, sent, strict=True)]
            trailers = [pack_trailer(*pair) for pair in zip(are_current, tags, strict=True)]
            send_pieces(connection, [b"".join(trailers)])

    def _memory_for(self, kind: int) -> ReadableMemory | None:
        if kind == READ and self._memory is None:
            raise ProtocolError("a reader, where nothing can be read")
        return self._memory if kind == READ else None


def _await_read(connection: socket.socket, sequence: int, num_fragments: int, memory: ReadableMemory) -> None:
    """Until the other end says that it has read a group."""
    deadline_s = time.monotonic() + _STEP_S
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(connection, select.POLLIN)
    while not poll.poll(0):
        memory.progress()
        if time.monotonic() > deadline_s:
            raise ProtocolError("a reader that does not get on")
        time.sleep(_PROGRESS_S)  # poll() itself waits a millisecond at least
    if unpack_head(receive_exactly(connection, HEAD_BYTES, deadline_s), sequence) != (READ, num_fragments):
        raise ProtocolError("not the group that is read")
