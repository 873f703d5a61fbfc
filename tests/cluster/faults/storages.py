"""Where sealed fragments lie, past the cluster: an arena's file, disk segments, a Redis, the wire between two hosts."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import redis

from kvstore.format.authenticity import TAG_BYTES
from kvstore.format.buffers import CopyBuffers
from kvstore.format.compression import stored_bytes_at
from kvstore.format.sealing import HEADER_BYTES, SEALED
from kvstore.names import FRAGMENT_KEY_BYTES
from kvstore.tiers.disk.segments import PAGE_BYTES, SUFFIX, open_file, read_pages, whole_pages, write_all
from kvstore.tiers.host.arena import arena_bytes

PAYLOAD_BYTES_OFFSET, CHECKSUM_OFFSET, ZEROS_OFFSET = 16, 24, 32
KEY_OFFSET = HEADER_BYTES - FRAGMENT_KEY_BYTES
_LOOK_BYTES = 1024 * 1024  # read at once; no fragment of a test is larger


class Storage(Protocol):
    """Where sealed fragments lie: a header and a payload each."""

    def read(self, key: bytes) -> bytes | None:
        """Header and payload, and what the storage keeps behind them."""

    def write(self, key: bytes, stored: bytes) -> None:
        """Instead of what is there; may be shorter."""


class ArenaStorage:
    """The file of a host's arena, mapped as the workers map it."""

    def __init__(self, path: Path, slot_bytes: int, num_slots: int) -> None:
        descriptor = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(descriptor, arena_bytes(slot_bytes, num_slots))
        os.close(descriptor)
        self._first = arena_bytes(slot_bytes, 0)
        self._stride = arena_bytes(slot_bytes, 1) - self._first
        self._num_slots = num_slots
        self._fragments: dict[bytes, tuple[int, int]] = {}

    def find(self) -> None:
        """Look where which fragment is now, and how long it is."""
        self._fragments = {}
        for slot in range(self._num_slots):
            at = self._first + slot * self._stride
            header = self._map[at : at + HEADER_BYTES]
            payload_bytes = int.from_bytes(header[PAYLOAD_BYTES_OFFSET:CHECKSUM_OFFSET], "little")
            if header.startswith(SEALED) and 0 < payload_bytes <= self._stride - HEADER_BYTES:
                self._fragments[header[KEY_OFFSET:]] = at, HEADER_BYTES + payload_bytes

    def read(self, key: bytes) -> bytes | None:
        """As in Storage."""
        at, size = self._fragments.get(key, (0, 0))
        return self._map[at : at + size] if size else None

    def write(self, key: bytes, stored: bytes) -> None:
        """As in Storage. What is cut off is nothing: a file that was not written to its end reads as zeros."""
        at, size = self._fragments[key]
        self._map[at : at + size] = stored[:size].ljust(size, b"\0")


class DiskStorage:
    """The segment files of a disk tier, past the page cache as the tier itself.

    Each page is looked at once, when it has been written: segments are written from their beginning to their end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pages = CopyBuffers(_LOOK_BYTES).take()
        self._ends: dict[Path, int] = {}  # up to where each segment was looked at
        self._fragments: dict[bytes, tuple[Path, int, int]] = {}

    def find(self, keys: Sequence[bytes]) -> bool:
        """Look what is there by now; whether all of these are."""
        paths = sorted(self._folder.glob(f"*{SUFFIX}"))
        if self._ends.keys() - set(paths):  # the oldest go when the tier is full
            self._ends = {path: end for path, end in self._ends.items() if path in paths}
            self._fragments = {key: storage for key, storage in self._fragments.items() if storage[0] in self._ends}
        for path in paths:
            with contextlib.suppress(FileNotFoundError), _opened(path, os.O_RDONLY) as file:
                self._ends[path] = self._look(file, path, self._ends.get(path, PAGE_BYTES))
        return all(key in self._fragments for key in keys)

    def _look(self, file: int, path: Path, end: int) -> int:
        """Notes what was written from `end` on, of two copies the later one; where nothing was written yet."""
        while True:
            num_bytes = read_pages(file, self._pages, end)
            at = 0
            while at + PAGE_BYTES <= num_bytes:
                header = bytes(self._pages[at : at + HEADER_BYTES])
                if not any(header):
                    return end + at
                size = stored_bytes_at(header) + TAG_BYTES
                if HEADER_BYTES + TAG_BYTES < size <= _LOOK_BYTES:
                    self._fragments[header[KEY_OFFSET:]] = path, end + at, size
                at += whole_pages(size) if size <= _LOOK_BYTES else PAGE_BYTES
            if at == 0:
                return end
            end += at

    def read(self, key: bytes) -> bytes | None:
        """As in Storage."""
        if key not in self._fragments:
            return None
        path, at, size = self._fragments[key]
        with contextlib.suppress(FileNotFoundError), _opened(path, os.O_RDONLY) as file:
            return bytes(self._pages[: min(size, read_pages(file, self._pages[: whole_pages(size)], at))])
        return None

    def write(self, key: bytes, stored: bytes) -> None:
        """As in Storage; what is cut off was never written."""
        path, at, size = self._fragments[key]
        self._pages[: whole_pages(size)] = stored[:size].ljust(whole_pages(size), b"\0")
        with _opened(path, os.O_WRONLY) as file:
            write_all(file, self._pages[: whole_pages(size)], at)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = open_file(path, flags)
    try:
        yield file
    finally:
        os.close(file)


class WireStorage:
    """Fragments that are on their way, a group at a time."""

    def __init__(self) -> None:
        self.fragments: dict[bytes, bytes] = {}

    def read(self, key: bytes) -> bytes | None:
        """As in Storage."""
        return self.fragments.get(key)

    def write(self, key: bytes, stored: bytes) -> None:
        """As in Storage; what is cut off is filled up: the bytes that follow must not be taken for these."""
        self.fragments[key] = stored[: len(self.fragments[key])].ljust(len(self.fragments[key]), b"\0")


class RedisStorage:
    """The values of a Redis."""

    def __init__(self, url: str, key_prefix: bytes) -> None:
        self._client = redis.Redis.from_url(url)
        self._prefix = key_prefix
        self._values: dict[bytes, bytes] = {}
        self._changed: dict[bytes, bytes] = {}

    def fetch(self, keys: Sequence[bytes]) -> None:
        """Read what is there."""
        values = self._client.mget([self._prefix + key for key in keys])
        self._values = {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    def store(self) -> None:
        """Write what was changed, as it is: whatever time to live a value had, it keeps."""
        pipeline = self._client.pipeline(transaction=False)
        for key, value in self._changed.items():
            pipeline.set(self._prefix + key, value, keepttl=True)
        pipeline.execute()
        self._changed = {}

    def read(self, key: bytes) -> bytes | None:
        """As in Storage."""
        return self._changed.get(key, self._values.get(key))

    def write(self, key: bytes, stored: bytes) -> None:
        """As in Storage."""
        self._changed[key] = stored
