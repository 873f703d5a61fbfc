"""Writes the segment files of a disk tier.

Fragments are staged in a batch and appended to the newest segment; the oldest segments make room for the next one.
The index has a fragment once it is written. Errors of the file system are raised: what follows from them is the
tier's decision. Knows nothing of reading.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.buffers import CopyBuffers
from kvstore.format.compression import compress
from kvstore.format.sealing import reseal
from kvstore.tiers.disk.disk_index import DiskIndex
from kvstore.tiers.disk.segments import (
    PAGE_BYTES,
    SegmentHeader,
    StoredFragment,
    complete_segment,
    create_segment,
    is_full,
    open_file,
    segment_path,
    whole_pages,
    write_all,
)


@dataclass(frozen=True, slots=True)
class DiskSizes:
    """Bounds of a disk tier, in bytes."""

    disk_bytes: int
    """Of all segment files together."""
    segment_bytes: int
    """Of one segment file; whole pages."""
    max_page_bytes: int
    """Of the pages of the largest fragment."""
    batch_bytes: int
    """Written at once."""


@dataclass(slots=True)
class _Open:
    """The segment that is being written."""

    number: int
    file_descriptor: int
    end: int = PAGE_BYTES


class SegmentWriter:
    """Not thread-safe: one thread at a time writes. `index_lock` guards the index and the counters, which others read;
    it is never held during a write."""

    def __init__(
        self,
        folder: Path,
        sizes: DiskSizes,
        index: DiskIndex,
        index_lock: threading.Lock,
        authenticator: FragmentAuthenticator,
        compresses: bool,
    ) -> None:
        """compresses: what is written from now on."""
        self._folder = folder
        self._sizes = sizes
        self._index = index
        self._index_lock = index_lock
        self._authenticator = authenticator
        self._compresses = compresses
        self.num_written = 0
        self.num_segments_evicted = 0
        # Wall time: numbers of two processes that follow each other in this folder never meet.
        self._next_number = time.time_ns()
        self._open: _Open | None = None
        self._batch = CopyBuffers(sizes.batch_bytes).take()
        self._staged: list[tuple[bytes, StoredFragment]] = []
        self._staged_bytes = 0

    def append(self, key: bytes, sealed: memoryview) -> None:
        """Stages a sealed fragment, which is changed; one that is too large is left out."""
        if whole_pages(sealed.nbytes + TAG_BYTES) > self._sizes.max_page_bytes:
            return
        compressed = compress(sealed) if self._compresses else None
        if compressed is not None and whole_pages(len(compressed) + TAG_BYTES) < whole_pages(len(sealed) + TAG_BYTES):
            sealed = compressed  # whole pages are saved, or it is not worth its decompression
        num_page_bytes = whole_pages(sealed.nbytes + TAG_BYTES)
        if self._staged_bytes + num_page_bytes > self._sizes.batch_bytes:
            self.flush()
        segment = self._open
        if segment is None or segment.end + self._staged_bytes + num_page_bytes > self._sizes.segment_bytes:
            self.complete()
            segment = self._start()
        reseal(sealed, segment.number)
        location = StoredFragment(segment.number, segment.end + self._staged_bytes, sealed.nbytes)
        target = self._batch[self._staged_bytes : self._staged_bytes + num_page_bytes]
        target[: sealed.nbytes] = sealed
        target[sealed.nbytes :] = self._authenticator.tag(sealed).ljust(num_page_bytes - sealed.nbytes, b"\0")
        self._staged.append((key, location))
        self._staged_bytes += num_page_bytes

    def flush(self) -> None:
        """Writes what is staged."""
        segment = self._open
        if segment is None or not self._staged:
            return
        write_all(segment.file_descriptor, self._batch[: self._staged_bytes], segment.end)
        segment.end += self._staged_bytes
        with self._index_lock:
            for key, location in self._staged:
                self._index.remember(key, location)
            self.num_written += len(self._staged)
        self._staged, self._staged_bytes = [], 0

    def _start(self) -> _Open:
        """Opens the next segment, for which the ones whose turn it is make room."""
        self.make_room(self._sizes.segment_bytes)
        number = self._next_number
        self._next_number += 1
        try:
            file_descriptor = self._create(number)
        except OSError as error:
            # Others may have filled the disk: what this tier has is then its bound. It does not keep the old forever.
            if not is_full(error) or not self._evict(lambda num_evicted: num_evicted == 0):
                raise
            file_descriptor = self._create(number)
        self._open = _Open(number, file_descriptor)
        with self._index_lock:
            self._index.resize(number, self._sizes.segment_bytes)
        return self._open

    def _create(self, number: int) -> int:
        key_id = self._authenticator.key_id
        return create_segment(self._folder, number, self._sizes.segment_bytes, key_id, self._batch)

    def complete(self) -> None:
        """Writes what is staged, and completes the open segment."""
        self.flush()
        segment = self._open
        if segment is None:
            return
        header = SegmentHeader(segment.number, self._authenticator.key_id, segment.end)
        complete_segment(segment.file_descriptor, header, self._batch)
        with self._index_lock:
            self._index.resize(segment.number, segment.end)
        self.abandon()

    def abandon(self) -> None:
        """Writes no more to the open segment; what it has can be read."""
        if self._open is not None:
            os.close(self._open.file_descriptor)
        self._open = None
        self._staged, self._staged_bytes = [], 0

    def make_room(self, num_bytes: int) -> None:
        """Gives up segments until so many more bytes fit within the tier's bound."""
        self._evict(lambda _: self._index.used_bytes + num_bytes > self._sizes.disk_bytes)

    def skip_number(self, number: int) -> None:
        """A segment of this number exists: later ones have higher numbers."""
        self._next_number = max(self._next_number, number + 1)

    def repair(self, header: SegmentHeader) -> None:
        """Completes a segment whose writer was killed, where the header says that it ends."""
        file_descriptor = open_file(segment_path(self._folder, header.number), os.O_WRONLY)
        try:
            complete_segment(file_descriptor, header, self._batch)
        finally:
            os.close(file_descriptor)
        with self._index_lock:
            self._index.resize(header.number, header.end)

    def _evict(self, is_wanted: Callable[[int], bool]) -> int:
        """Gives up segments while is_wanted(number gone so far) and there are any; how many went."""
        numbers: list[int] = []
        with self._index_lock:
            while self._index.num_segments and is_wanted(len(numbers)):
                numbers.append(self._index.evict())
            self.num_segments_evicted += len(numbers)
        for number in numbers:  # without the lock: a disk that hangs must not hold up who looks into the index
            segment_path(self._folder, number).unlink(missing_ok=True)
        return len(numbers)
