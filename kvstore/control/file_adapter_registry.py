"""Adapters of a cluster in one file that all routers of a machine share: SQLite, as the stream journal's file.

It outlives any process, but not the machine. Knows nothing of what a record says.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from kvstore.control.adapter_registry import AdapterRecord, RegistryUnavailable

_SCHEMA = "create table if not exists adapters(name text primary key, record text not null) without rowid"
_WAIT_FOR_OTHERS_S = 2.0


class FileAdapterRegistry:
    """As in AdapterRegistry. Raises RegistryUnavailable when the file cannot be opened as a registry.

    SQLite in its default mode, not with a write-ahead log: writes are rare.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._available():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_WAIT_FOR_OTHERS_S, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma synchronous = off")
            self._db.execute(_SCHEMA)

    def records(self) -> list[AdapterRecord]:
        """As in AdapterRegistry."""
        with self._lock, self._available():
            rows = self._db.execute("select record from adapters order by name").fetchall()
        return [AdapterRecord.unpacked(row[0]) for row in rows]

    def find(self, name: str) -> AdapterRecord | None:
        """As in AdapterRegistry."""
        with self._lock, self._available():
            row = self._db.execute("select record from adapters where name = ?", (name,)).fetchone()
        return None if row is None else AdapterRecord.unpacked(row[0])

    def replace(self, name: str, old: AdapterRecord | None, new: AdapterRecord | None) -> bool:
        """As in AdapterRegistry."""
        if new is None and old is None:
            return self.find(name) is None
        if new is None:
            change = "delete from adapters where name = :name and record = :old"
        elif old is None:
            change = "insert into adapters(name, record) values (:name, :new) on conflict(name) do nothing"
        else:
            change = "update adapters set record = :new where name = :name and record = :old"
        arguments = {"name": name, "old": old and old.packed(), "new": new and new.packed()}
        with self._lock, self._available():
            return self._db.execute(change, arguments).rowcount > 0

    def close(self) -> None:
        """As in AdapterRegistry."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RegistryUnavailable(f"adapter registry {self._path}: {error}") from error
