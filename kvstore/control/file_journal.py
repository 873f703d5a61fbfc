"""A journal in one file that all routers of a machine share: SQLite with a write-ahead log.

A commit is an append to the log and outlives any process, but not the machine: synchronous is off, since a machine that
goes down takes the workers with it. Knows nothing of what headers and endings mean.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvstore.control.journal import (
    DEFAULT_MAX_STREAMS,
    DEFAULT_TTL_S,
    Change,
    JournalEntry,
    JournalUnavailable,
    Verdict,
    pack_token_ids,
    unpack_token_ids,
)

_SCHEMA = """
create table if not exists streams(
  stream_id text primary key, epoch integer not null, header blob not null, num_tokens integer not null,
  ending text not null, expires_s real not null
) without rowid;
create table if not exists tokens(
  stream_id text not null, position integer not null, packed blob not null, primary key(stream_id, position)
) without rowid;
create index if not exists streams_by_expiry on streams(expires_s);
"""
_WAIT_FOR_OTHERS_S = 2.0
_SWEEP_EVERY_S = 5.0


class FileJournal:
    """As in StreamJournal. Raises JournalUnavailable when the file cannot be opened as a journal."""

    def __init__(
        self,
        path: Path,
        wall_clock: Callable[[], float],
        ttl_s: float = DEFAULT_TTL_S,
        max_streams: int = DEFAULT_MAX_STREAMS,
    ) -> None:
        self._clock = wall_clock  # shared by all processes, so it is the wall's
        self._ttl_s = ttl_s
        self._max_streams = max_streams
        self._next_sweep_s = 0.0
        self._lock = threading.Lock()
        self._path = path
        self._is_closed = False
        with _available():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connect()

    def commit(self, changes: Sequence[Change]) -> list[Verdict]:
        """As in StreamJournal."""
        with self._transaction():
            now_s = self._clock()
            verdicts = [self._apply(change, now_s) for change in changes]
            if now_s >= self._next_sweep_s:
                self._sweep(now_s)
            return verdicts

    def look_up(self, stream_id: str) -> JournalEntry | None:
        """As in StreamJournal."""
        with self._transaction():
            return self._entry(stream_id)

    def claim(self, stream_id: str) -> JournalEntry | None:
        """As in StreamJournal."""
        with self._transaction():
            now_s = self._clock()
            self._db.execute(
                "update streams set epoch = epoch + 1, expires_s = ? where stream_id = ? and expires_s > ?",
                (now_s + self._ttl_s, stream_id, now_s),
            )
            return self._entry(stream_id)

    def close(self) -> None:
        """As in StreamJournal."""
        with self._lock:
            self._is_closed = True
            self._db.close()

    def _connect(self) -> None:
        self._db = sqlite3.connect(
            self._path, timeout=_WAIT_FOR_OTHERS_S, isolation_level=None, check_same_thread=False
        )
        self._switch_to_wal()
        self._db.execute("pragma synchronous = off")
        self._db.executescript(_SCHEMA)
        self._file = self._file_there()

    def _file_there(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        return stat.st_dev, stat.st_ino

    def _switch_to_wal(self) -> None:
        # SQLite's own wait for a lock does not cover this switch, and routers of one machine start together.
        deadline_s = time.monotonic() + _WAIT_FOR_OTHERS_S
        while True:
            try:
                self._db.execute("pragma journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.01)

    def _entry(self, stream_id: str) -> JournalEntry | None:
        row = self._db.execute(
            "select epoch, header, ending from streams where stream_id = ? and expires_s > ?",
            (stream_id, self._clock()),
        ).fetchone()
        if row is None:
            return None
        parts = self._db.execute("select packed from tokens where stream_id = ? order by position", (stream_id,))
        packed = b"".join(part for (part,) in parts)
        return JournalEntry(row[0], row[1], unpack_token_ids(packed), row[2])

    def _apply(self, change: Change, now_s: float) -> Verdict:
        if change.header is not None:
            self._open(change)
        updated = self._db.execute(
            "update streams set num_tokens = num_tokens + ?, ending = ?, expires_s = ?"
            " where stream_id = ? and epoch = ? and num_tokens = ?",
            (
                len(change.token_ids),
                change.ending,
                now_s + self._ttl_s,
                change.stream_id,
                change.epoch,
                change.position,
            ),
        )
        if updated.rowcount == 0:
            row = self._db.execute("select epoch from streams where stream_id = ?", (change.stream_id,)).fetchone()
            return Verdict.SUPERSEDED if row is not None and row[0] > change.epoch else Verdict.MISSING
        if change.token_ids:
            packed = pack_token_ids(change.token_ids)
            self._db.execute("insert into tokens values (?, ?, ?)", (change.stream_id, change.position, packed))
        return Verdict.COMMITTED

    def _open(self, change: Change) -> None:
        opened = self._db.execute(
            "insert into streams values (?, ?, ?, 0, '', 0) on conflict(stream_id) do update"
            " set epoch = excluded.epoch, header = excluded.header, num_tokens = 0, ending = ''"
            " where streams.epoch <= excluded.epoch",
            (change.stream_id, change.epoch, change.header),
        )
        if opened.rowcount > 0:
            self._db.execute("delete from tokens where stream_id = ?", (change.stream_id,))

    def _sweep(self, now_s: float) -> None:
        self._next_sweep_s = now_s + _SWEEP_EVERY_S
        (num_streams,) = self._db.execute("select count(*) from streams").fetchone()
        self._db.execute("create temp table if not exists gone(stream_id text)")
        self._db.execute("insert into gone select stream_id from streams where expires_s <= ?", (now_s,))
        excess = num_streams - self._max_streams
        if excess > 0:
            self._db.execute("insert into gone select stream_id from streams order by expires_s limit ?", (excess,))
        for table in ("tokens", "streams"):
            self._db.execute(f"delete from {table} where stream_id in (select stream_id from gone)")
        self._db.execute("delete from gone")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _available():
            if not self._is_closed and self._file_there() != self._file:
                # Removed, as a cleaner of /tmp does: SQLite would go on in a file that no other router finds.
                self._db.close()
                self._connect()
            self._db.execute("begin immediate")
            try:
                yield
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")


@contextlib.contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise JournalUnavailable(str(error)) from error
