"""A worker's block events, with quick followers, slow ones, and none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from switchyard.v1 import worker_pb2 as pb

from kvstore.blocks.block_log import DEFAULT_MAX_NAMES, MAX_NAMES_AT_ONCE
from workers.engine.loop import LoopEvents
from workers.server.block_events import BlockFeed


def name(number: int) -> bytes:
    return number.to_bytes(16)


class Engine:
    """An engine that holds blocks by name, as the feed sees it."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.asked: list[bool] = []
        self.feed = BlockFeed("w", lambda command: self.asked.append(command.is_on))

    def answer(self) -> None:
        """As the engine's thread does when it comes to a FollowBlocks(True)."""
        self.feed.take(LoopEvents(held_blocks=sorted(self.held)))

    def change(self, *, stored: range = range(0), removed: range = range(0)) -> None:
        changes = {**{name(n): True for n in stored}, **{name(n): False for n in removed}}
        self.held = (self.held | {name(n) for n in stored}) - {name(n) for n in removed}
        self.feed.take(LoopEvents(block_changes=changes))


class Reader:
    """A router's end of the call; `is_open` may be cleared for a while."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.names: set[bytes] = set()
        self.num_snapshots = 0
        self.num_messages = 0
        self._sequence = -1

    async def write(self, message: pb.WatchBlocksResponse) -> None:
        await self.is_open.wait()
        self.num_messages += 1
        if message.WhichOneof("message") == "snapshot":
            part = message.snapshot
            assert len(part.names) <= MAX_NAMES_AT_ONCE
            self.names = set(part.names) if part.part == 0 else self.names | set(part.names)
            self._sequence = part.sequence
            self.num_snapshots += part.is_last
        else:
            changes = message.changes
            assert changes.after == self._sequence, "it was sent changes that it cannot use"
            assert len(changes.stored) + len(changes.removed) <= MAX_NAMES_AT_ONCE
            self.names = (self.names - set(changes.removed)) | set(changes.stored)
            self._sequence = changes.sequence

    async def has(self, engine: Engine) -> None:
        async with asyncio.timeout(20):
            while self.names != engine.held:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def following(engine: Engine, reader: Reader) -> AsyncIterator[None]:
    task = asyncio.create_task(engine.feed.follow(reader.write))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_changes_follow_a_snapshot() -> None:
    engine, reader = Engine(), Reader()
    engine.change(stored=range(5000))
    async with following(engine, reader):
        engine.answer()
        await reader.has(engine)
        for number in range(20):
            engine.change(stored=range(6000 + number, 6001 + number), removed=range(number, number + 1))
        await reader.has(engine)
        assert reader.num_snapshots == 1
        assert reader.num_messages <= 5, "twenty steps at once are one or two messages"


async def test_nothing_is_asked_of_an_engine_that_nobody_follows() -> None:
    engine = Engine()
    async with following(engine, Reader()), following(engine, Reader()):
        assert engine.asked == [True]
    assert engine.asked == [True, False]


async def test_who_comes_while_the_last_one_leaves_gets_the_truth() -> None:
    engine, reader = Engine(), Reader()
    async with following(engine, Reader()):
        engine.answer()
    engine.held = {name(1)}  # no block event: nothing was noted
    async with following(engine, reader):
        engine.change(stored=range(7, 8))  # on its way while the engine was not asked again yet
        assert reader.num_messages == 0
        engine.answer()
        await reader.has(engine)
        assert engine.asked == [True, False, True]


async def test_a_slow_reader_gets_a_snapshot_and_a_quick_one_does_not() -> None:
    engine, quick, slow = Engine(), Reader(), Reader()
    async with following(engine, quick), following(engine, slow):
        engine.answer()
        engine.change(stored=range(1))
        await quick.has(engine)
        await slow.has(engine)
        slow.is_open.clear()
        for start in range(1, DEFAULT_MAX_NAMES + 10_000, 8192):
            engine.change(stored=range(start, start + 8192))
            await quick.has(engine)
        engine.change(removed=range(100))
        await quick.has(engine)
        slow.is_open.set()
        await slow.has(engine)
        assert (quick.num_snapshots, slow.num_snapshots) == (1, 2)
