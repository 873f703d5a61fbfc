"""What a worker has to say to one router, until the connection takes it.

Loads replace each other, so a router that reads slowly gets the newest and no queue of old ones. Messages that wait are
bounded: a router that does not read any more loses its connection, not the worker its memory. For one event loop; knows
nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
from collections import deque

from switchyard.v1 import worker_pb2 as pb

MAX_WAITING_MESSAGES = 10_000  # a message per engine step: minutes of them


class Outbox:
    """The newest load, and all other messages in their order."""

    def __init__(self) -> None:
        self._messages: deque[pb.ConnectResponse] = deque()
        self._load: pb.ConnectResponse | None = None
        self._has_some = asyncio.Event()
        self.is_closed = False

    def put(self, message: pb.ConnectResponse) -> None:
        """Say it, in its order. Ends the connection when too much waits."""
        self._messages.append(message)
        self._has_some.set()
        if len(self._messages) > MAX_WAITING_MESSAGES:
            self.close()

    def put_load(self, load: pb.WorkerLoad) -> None:
        """Say it before what waits, unless a newer one comes first."""
        self._load = pb.ConnectResponse(load=load)
        self._has_some.set()

    def close(self) -> None:
        """End the connection; what waits is dropped."""
        self.is_closed = True
        self._has_some.set()

    async def get(self) -> pb.ConnectResponse | None:
        """The next message; None when the connection is to end."""
        while not self.is_closed:
            if self._load is not None:
                load, self._load = self._load, None
                return load
            if self._messages:
                return self._messages.popleft()
            self._has_some.clear()
            await self._has_some.wait()
        return None
