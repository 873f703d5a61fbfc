"""Adapters of a cluster in one file that all routers of a machine share: SQLite, as the stream journal's file.

It outlives any process, but not the machine. Knows nothing of what a record says.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstore.control.adapter_registry import AdapterRecord, RecordReader, RegistryUnavailable

_SCHEMA = "create table if not exists adapters(name text primary key, record text not null) without rowid"
_UPDATE = "update adapters set record = :new where name = :name and record = :old"
_WAIT_FOR_OTHERS_S = 2.0


class FileAdapterRegistry:
    """As in AdapterRegistry. Raises RegistryUnavailable when the file cannot be opened as a registry.

    SQLite in its default mode, not with a write-ahead log: writes are rare.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._reader = RecordReader()
        with self._available():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_WAIT_FOR_OTHERS_S, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma synchronous = off")
            self._db.execute(_SCHEMA)

    def records(self) -> list[AdapterRecord]:
        """As in AdapterRegistry."""
        with self._lock, self._available():
            rows = self._db.execute("select record from adapters order by name").fetchall()
        found = (self._reader.read(row[0]) for row in rows)
        return [record for record in found if record is not None]

    def find(self, name: str) -> AdapterRecord | None:
        """As in AdapterRegistry."""
        text = self._text(name)
        return None if text is None else self._reader.read(text)

    def replace(self, name: str, old: AdapterRecord | None, new: AdapterRecord | None) -> bool:
        """As in AdapterRegistry."""
        if new is None and old is None:
            return self.find(name) is None
        if new is None:
            change = "delete from adapters where name = :name and record = :old"
        elif old is None:
            change = "insert into adapters(name, record) values (:name, :new) on conflict(name) do nothing"
        else:
            change = _UPDATE
        arguments = {"name": name, "old": old and old.packed(), "new": new and new.packed()}
        if self._change(change, arguments):
            return True
        there = self._text(name) if old is None else None
        if there is None or self._reader.read(there) is not None:
            return False
        return self._change(_UPDATE, {**arguments, "old": there})

    def close(self) -> None:
        """As in AdapterRegistry."""
        with self._lock:
            self._db.close()

    def _text(self, name: str) -> str | bytes | None:
        with self._lock, self._available():
            row = self._db.execute("select record from adapters where name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _change(self, change: str, arguments: dict[str, Any]) -> bool:
        with self._lock, self._available():
            return self._db.execute(change, arguments).rowcount > 0

    @contextlib.contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RegistryUnavailable(f"adapter registry {self._path}: {error}") from error
