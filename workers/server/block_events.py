"""Tells routers which blocks this worker's device holds: a snapshot, then what changed, for each at its own pace.

Nothing is recorded without a follower. Lives on the server's asyncio loop. Knows nothing of tensors, or of why a block
came or went.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from switchyard.v1 import worker_pb2 as pb

from kvstore.blocks.block_log import MAX_NAMES_AT_ONCE, BlockLog, BlockSnapshot
from workers.engine.loop import FollowBlocks, LoopEvents

_PERIOD_S = 0.02  # least time between two messages to one router; the first after a pause goes at once

Write = Callable[[pb.WatchBlocksResponse], Awaitable[None]]


class BlockFeed:
    """The log of one engine's blocks and those who follow it. post: hands the engine's loop a command."""

    def __init__(self, worker_id: str, post: Callable[[FollowBlocks], None]) -> None:
        self._worker_id = worker_id
        self._post = post
        self._log = BlockLog()
        self._is_live = False  # the log is what the engine holds
        self._followers: set[asyncio.Event] = set()  # each is set when there may be changes

    async def follow(self, write: Write) -> None:
        """Writes the block events of one router, until cancelled. A slow router gets a snapshot now and then."""
        has_changes = asyncio.Event()
        self._followers.add(has_changes)
        if len(self._followers) == 1:
            self._post(FollowBlocks(True))
        try:
            await self._follow(write, has_changes)
        finally:
            self._followers.discard(has_changes)
            if not self._followers:
                self._is_live = False
                self._post(FollowBlocks(False))

    async def _follow(self, write: Write, has_changes: asyncio.Event) -> None:
        position = -1
        while True:
            has_changes.clear()
            changes = self._log.since(position)
            if not self._is_live or (changes is not None and changes.sequence == position):
                await has_changes.wait()
                continue
            if changes is None:
                snapshot = self._log.snapshot()
                for part in self._parts(snapshot):
                    await write(pb.WatchBlocksResponse(snapshot=part))
                position = snapshot.sequence
            else:
                message = pb.BlockChanges(
                    after=changes.after, sequence=changes.sequence, stored=changes.stored, removed=changes.removed
                )
                await write(pb.WatchBlocksResponse(changes=message))
                position = changes.sequence
            await asyncio.sleep(_PERIOD_S)

    def _parts(self, snapshot: BlockSnapshot) -> Iterator[pb.BlockSnapshotPart]:
        starts = range(0, max(1, len(snapshot.names)), MAX_NAMES_AT_ONCE)
        for part, start in enumerate(starts):
            yield pb.BlockSnapshotPart(
                worker_id=self._worker_id,
                sequence=snapshot.sequence,
                part=part,
                is_last=part == len(starts) - 1,
                names=snapshot.names[start : start + MAX_NAMES_AT_ONCE],
            )

    def take(self, events: LoopEvents) -> None:
        """The engine held all that, or something changed."""
        if events.held_blocks is not None and self._followers:
            self._log.restart(events.held_blocks)
            self._is_live = True
        elif events.block_changes is not None and self._is_live:
            self._log.append(events.block_changes)
        else:
            return
        for has_changes in self._followers:
            has_changes.set()
