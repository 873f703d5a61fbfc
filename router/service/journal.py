"""Writes the tokens of live streams down, in groups: while one commit is under way, the next one gathers. Where nobody
waits for it, it gathers a little longer.

A stream is dirty when it has more than the journal; each commit takes all dirty streams from where each one's last
commit ended, so an outage heals by itself and nothing is written twice. While the journal is away streams run on and
cannot be resumed; `is_up` says so. Knows nothing of what a header means.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore.control.journal import Change, JournalEntry, JournalUnavailable, StreamJournal, Verdict
from router.errors import JournalAway, Superseded

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_GATHER_S = 0.02  # what a router that is killed may not have written down of streams whose clients keep their ids
_MAX_BACKLOG = 10_000  # streams kept for a journal that is away; those beyond can never be resumed


class StreamLog:
    """One stream's side of the journal: add() tokens as they are given out, close() in any case."""

    def __init__(self, writer: JournalWriter, stream_id: str, header: bytes, entry: JournalEntry | None = None) -> None:
        """A new stream, or one that was claimed."""
        self.stream_id = stream_id
        self.header = header
        self.epoch = 1 if entry is None else entry.epoch
        self.token_ids: list[int] = [] if entry is None else list(entry.token_ids)
        self.ending = "" if entry is None else entry.ending
        self.num_committed = len(self.token_ids)
        self.has_header = entry is not None  # committed
        self.has_ending = bool(self.ending)  # committed
        self.is_superseded = False
        self._writer = writer
        self._is_closed = False
        if entry is None:
            writer.mark(self)

    def add(self, first_position: int, token_ids: Sequence[int]) -> None:
        """Tokens of the stream; those that it has are passed over. Raises Superseded when it was resumed elsewhere."""
        self._check()
        self.token_ids.extend(token_ids[len(self.token_ids) - first_position :])
        self._writer.mark(self)

    def cut(self, num_tokens: int) -> None:
        """Only the first tokens count: what came after them is chosen again, and replaces them in the journal."""
        if num_tokens < len(self.token_ids) or self.ending:
            self.token_ids, self.ending = self.token_ids[:num_tokens], ""
            self.has_header, self.has_ending, self.num_committed = False, False, 0
            self._writer.mark(self)

    def end(self, ending: str) -> None:
        """The stream is complete."""
        self.ending = ending
        self._writer.mark(self)

    async def committed(self) -> None:
        """Wait until all of it is written down, or the journal is away. Raises Superseded."""
        while self.is_dirty and not self._is_closed and self._writer.is_up:
            await self._writer.next_commit()
        self._check()

    def close(self) -> None:
        """Nobody waits for it any more. What is dirty is still written."""
        self._is_closed = True

    @property
    def is_dirty(self) -> bool:
        """Whether the journal has less than this."""
        is_behind = not self.has_header or self.num_committed < len(self.token_ids)
        return not self.is_superseded and (is_behind or (bool(self.ending) and not self.has_ending))

    def change(self) -> Change:
        """What the journal lacks."""
        first = self.num_committed if self.has_header else 0
        return Change(
            stream_id=self.stream_id,
            epoch=self.epoch,
            position=first,
            token_ids=tuple(self.token_ids[first:]),
            header=None if self.has_header else self.header,
            ending=self.ending,
        )

    def settle(self, change: Change, verdict: Verdict) -> None:
        """What became of a change."""
        if verdict is Verdict.COMMITTED:
            self.has_header = True
            self.num_committed = change.position + len(change.token_ids)
            self.has_ending = bool(change.ending)
        elif verdict is Verdict.SUPERSEDED:
            self.is_superseded = True
        else:
            self.has_header, self.num_committed = False, 0  # the journal lost it: from the beginning

    def _check(self) -> None:
        if self.is_superseded:
            raise Superseded(f"stream {self.stream_id} was resumed elsewhere")


class JournalWriter:
    """The journal of one router. run() in a task; stop() writes what is left."""

    def __init__(self, journal: StreamJournal | None) -> None:
        """Without a journal nothing can be resumed, and everything else works."""
        self._journal = journal
        self._dirty: dict[int, StreamLog] = {}  # by identity
        self._in_flight: list[StreamLog] = []
        self._has_work = asyncio.Event()
        self._is_awaited = asyncio.Event()
        self._settled = asyncio.Event()  # replaced after each commit
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="journal")
        self.is_up = journal is not None

    @property
    def is_kept(self) -> bool:
        """Whether there is a journal, be it away."""
        return self._journal is not None

    @property
    def is_missing(self) -> bool:
        """Whether there should be a journal and is none."""
        return self._journal is not None and not self.is_up

    def open(self, stream_id: str, header: bytes) -> StreamLog:
        """A new stream."""
        return StreamLog(self, stream_id, header)

    async def look_up(self, stream_id: str) -> JournalEntry | None:
        """What is known of a stream; None when no router knows it. Raises JournalAway."""
        return None if self._journal is None else await self._ask(self._journal.look_up, stream_id)

    async def claim(self, stream_id: str) -> JournalEntry | None:
        """Take a stream over; None when no router knows it. Raises JournalAway."""
        return None if self._journal is None else await self._ask(self._journal.claim, stream_id)

    async def _ask(self, question: Callable[[str], JournalEntry | None], stream_id: str) -> JournalEntry | None:
        while self.is_up and self._has_more_of(stream_id):  # it was ours: first what we have of it
            await self.next_commit()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, question, stream_id)
        except JournalUnavailable as error:
            raise JournalAway(f"the stream journal is away ({error})", retry_after_s=1.0) from None

    def adopt(self, stream_id: str, entry: JournalEntry) -> StreamLog:
        """The log of a stream that was claimed."""
        return StreamLog(self, stream_id, entry.header, entry)

    def mark(self, stream: StreamLog) -> None:
        """A stream has more than the journal."""
        if self._journal is not None:
            self._dirty[id(stream)] = stream
            self._has_work.set()

    async def next_commit(self) -> None:
        """Ask for a commit, and wait for the end of one, good or bad."""
        self._is_awaited.set()
        await self._settled.wait()

    def _has_more_of(self, stream_id: str) -> bool:
        return any(one.stream_id == stream_id for one in (*self._dirty.values(), *self._in_flight))

    async def run(self) -> None:
        """Commit until cancelled."""
        while True:
            await self._has_work.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_S):
                    await self._is_awaited.wait()
            if not await self._commit():
                await asyncio.sleep(_RETRY_S)

    async def stop(self) -> None:
        """Write what is left and let go of the journal. After run() was cancelled; harmless when repeated."""
        if self._journal is not None:
            await self._commit()
            journal, self._journal = self._journal, None
            await asyncio.get_running_loop().run_in_executor(self._threads, journal.close)
        self._threads.shutdown(wait=False)

    async def _commit(self) -> bool:
        assert self._journal is not None, "only a journal makes streams dirty"
        self._has_work.clear()
        self._is_awaited.clear()
        batch, self._dirty = [one for one in self._dirty.values() if one.is_dirty], {}
        self._in_flight = batch
        changes = [one.change() for one in batch]
        try:
            verdicts = await asyncio.get_running_loop().run_in_executor(self._threads, self._journal.commit, changes)
        except JournalUnavailable as error:
            if self.is_up:
                log.warning("the stream journal is away, streams run on and cannot be resumed: %s", error)
            self.is_up = False
            for one in batch:
                if len(self._dirty) < _MAX_BACKLOG:
                    self.mark(one)
        except asyncio.CancelledError:
            for one in batch:  # stop() asks again; what was written meanwhile is then written anew
                self.mark(one)
            raise
        else:
            if not self.is_up:
                log.info("the stream journal is back")
            self.is_up = True
            for one, change, verdict in zip(batch, changes, verdicts, strict=True):
                one.settle(change, verdict)
                if one.is_dirty:
                    self.mark(one)
        self._in_flight = []
        settled, self._settled = self._settled, asyncio.Event()
        settled.set()
        return self.is_up
