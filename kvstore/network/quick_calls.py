"""Calls over a plain socket, for which those of gRPC take too long: the slot calls of a KV node.

    request   kind (uint8), bytes of the message (uint32), the message
    answer    0 and the message, or 1 and why there is none, in the same form

A call of gRPC's Python costs half a millisecond and more, and a KV transfer waits for two; in half a millisecond four
megabytes are copied. A thread for each connection, a connection for each call in progress. Knows nothing of the calls'
meaning.
"""

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kvstore.network.acceptor import Acceptor
from kvstore.network.addresses import connect, listen, split_host_port, with_port

UNIX = "unix:"

_HEAD = struct.Struct("<BI")
_GOOD, _REFUSED = 0, 1
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_CONNECT_S = 1.0
_MAX_CONNECTIONS = 1024


class Message(Protocol):
    """Of protobuf, or alike."""

    def SerializeToString(self) -> bytes:
        """Its bytes."""


Handler = Callable[[bytes], Message]


class CallRefused(OSError):
    """The other end says that the request is none."""


class QuickCalls:
    """A client. Thread-safe. Connects when it is used."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """address: unix:PATH or HOST:PORT. timeout_s: without a single byte of an answer."""
        self._address = address
        self._timeout_s = timeout_s
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def begin(self, kind: int, request: Message, parse: Callable[[bytes], Any]) -> "CallInProgress":
        """One call; never made twice. Raises OSError when the other end is away."""
        connection = self._take()
        try:
            message = request.SerializeToString()
            connection.sendall(_HEAD.pack(kind, len(message)) + message)
        except BaseException:
            connection.close()
            raise
        return CallInProgress(connection, self._give_back, parse)

    def close(self) -> None:
        """Calls fail from then on."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> socket.socket:
        with self._lock:
            if self._is_closed:
                raise OSError("closed")
            while self._idle:
                connection = self._idle.pop()
                if _is_alive(connection):
                    return connection
                connection.close()
        connection = _connect(self._address)
        connection.settimeout(self._timeout_s)
        return connection

    def _give_back(self, connection: socket.socket) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()


class CallInProgress:
    """A call that was sent. Its answer is to be taken once, or given up."""

    def __init__(
        self, connection: socket.socket, give_back: Callable[[socket.socket], None], parse: Callable[[bytes], Any]
    ) -> None:
        self._connection = connection
        self._give_back = give_back
        self._parse = parse

    def answer(self) -> Any:
        """Waits for it. Raises OSError when the other end is away, too slow or refuses."""
        try:
            status, answer = _receive(self._connection)
        except BaseException:
            self._connection.close()
            raise
        self._give_back(self._connection)
        if status != _GOOD:
            raise CallRefused(answer.decode(errors="replace"))
        try:
            return self._parse(answer)
        except Exception as error:
            raise OSError(f"not an answer: {error}") from error

    def give_up(self) -> None:
        """The caller does not need the answer; the call may be carried out all the same."""
        self._connection.close()


class CallServer:
    """Listens from the start. Raises OSError when it cannot."""

    def __init__(self, address: str, handlers: Mapping[int, Handler]) -> None:
        """address: unix:PATH or HOST:PORT. A handler raises ValueError for a request that is none."""
        self._handlers = handlers
        listener = _listen(address)
        self.address = address
        """With the port that it really got."""
        if not address.startswith(UNIX):
            self.address = with_port(address, listener.getsockname()[1])
        self._acceptor = Acceptor(listener, self._serve, "kv-call", _MAX_CONNECTIONS)

    def close(self) -> None:
        """Ends all connections."""
        self._acceptor.close()
        if self.address.startswith(UNIX):
            Path(self.address.removeprefix(UNIX)).unlink(missing_ok=True)

    def _serve(self, connection: socket.socket) -> None:
        """Until the other end is gone. An error of a handler's own is not taken for that."""
        while True:
            try:
                kind, message = _receive(connection)
            except OSError:
                return
            answer = self._answer(kind, message)
            try:
                connection.sendall(answer)
            except OSError:
                return

    def _answer(self, kind: int, message: bytes) -> bytes:
        try:
            if kind not in self._handlers:
                raise ValueError(f"no call {kind}")
            answer = self._handlers[kind](message).SerializeToString()
            return _HEAD.pack(_GOOD, len(answer)) + answer
        except ValueError as error:
            why = str(error).encode()
            return _HEAD.pack(_REFUSED, len(why)) + why


def _receive(connection: socket.socket) -> tuple[int, bytes]:
    """Kind or status, and what follows."""
    kind, num_bytes = _HEAD.unpack(_receive_exactly(connection, _HEAD.size))
    if num_bytes > _MAX_MESSAGE_BYTES:
        raise ConnectionError(f"a message of {num_bytes} bytes")
    return int(kind), _receive_exactly(connection, num_bytes)


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise ConnectionResetError("the other end closed the connection")
        if len(part) == num_bytes:
            return part
        received += part
    return bytes(received)


def _is_alive(connection: socket.socket) -> bool:
    """Nothing is due on an idle connection: what can be read of one is its end."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return not poll.poll(0)


def _connect(address: str) -> socket.socket:
    if address.startswith(UNIX):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_CONNECT_S)
            connection.connect(address.removeprefix(UNIX))
        except BaseException:
            connection.close()
            raise
        return connection
    connection = connect(address, _CONNECT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _listen(address: str) -> socket.socket:
    if not address.startswith(UNIX):
        return listen(*split_host_port(address), backlog=64)
    path = address.removeprefix(UNIX)
    listener = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a killed process; whether one lives was asked before, at its main address
        listener.bind(path)
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener
