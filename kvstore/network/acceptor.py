"""Accepts connections, a thread for each, and ends all of them when it is closed.

Knows nothing of their protocol.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_PAUSE_S = 0.1  # when none can be accepted: too many open files, for example


class Acceptor:
    """Accepts from the start."""

    def __init__(
        self, listener: socket.socket, serve: Callable[[socket.socket], None], name: str, max_connections: int
    ) -> None:
        """serve: talks until the other end is gone. name: of the threads. A connection beyond max_connections is closed
        at once."""
        self._listener = listener
        self._serve = serve
        self._name = name
        self._max_connections = max_connections
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections, and the listener."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        for open_socket in (self._listener, *connections):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._is_closed:
                    log.warning("no connection accepted: %s", error)
                    time.sleep(_PAUSE_S)
                continue
            with self._lock:
                if self._is_closed or len(self._connections) >= self._max_connections:
                    connection.close()
                    continue
                self._connections.add(connection)
            threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._serve(connection)
        finally:
            with self._lock:
                self._connections.discard(connection)
