"""What this router serves, and which workers belong to it.

Whoever starts routers and workers together tells each router the digest of the weights. A router that runs by itself
does not read hundreds of gigabytes to know it: it takes over the digest of the first worker that connects, refuses
workers with others, and takes over another one only when its own have been gone for a while, as after an upgrade.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable

from checkpoint.identity import ServedModel


class ServedIdentity:
    """For one event loop.

    hold_s: how long the weights of workers that are gone are held on to: as long as streams wait for a replacement.
    """

    def __init__(self, configured: ServedModel, hold_s: float, clock: Callable[[], float]) -> None:
        self.configured = configured
        """As routers tell it to workers: without weights where they are the workers' to tell."""
        self.now = configured
        """With the weights that are served now."""
        self._hold_s = hold_s
        self._clock = clock
        self._num_workers = 0
        self._held_until_s = -math.inf
        self._is_known = asyncio.Event()
        if configured.weights:
            self._is_known.set()

    async def known(self, timeout_s: float) -> bool:
        """Wait until it is known which weights are served; False: no worker came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_known.wait()
        except TimeoutError:
            return False
        return True

    def join(self, theirs: ServedModel) -> str:
        """A worker connects. Why it does not belong here; "" when it does, and then `leave` follows one day."""
        is_free = self._num_workers == 0 and self._clock() >= self._held_until_s
        if not self.configured.weights and is_free:
            mine = dataclasses.replace(self.configured, weights=theirs.weights)
        else:
            mine = self.now
        difference = mine.difference(theirs)
        if not difference:
            self.now = mine
            self._num_workers += 1
            self._is_known.set()
        return difference

    def leave(self) -> None:
        """The connection to a worker that joined has ended."""
        self._num_workers -= 1
        if self._num_workers == 0:
            self._held_until_s = self._clock() + self._hold_s
