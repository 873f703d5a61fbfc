"""The disk tier of a host: sealed fragments in a bounded folder of segment files, and the index of what is in which.

Fragments are appended to the newest segment; when there is no room for another one, the oldest goes as a whole, unless
it was read since it was last its turn. What is read is verified on the copy. Survives its process: the index is read
from the segments, and what had not been completed is verified or dropped. One process at a time holds the folder.
Nothing is raised because the disk is full, broken or away: the tier takes nothing then, or is down, and comes back.
Knows nothing of arenas and slots.
"""

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.buffers import CopyBuffers
from kvstore.format.compression import check_compression, decompress, is_compressed, unseal_stored
from kvstore.format.fragment import Rejected
from kvstore.format.sealing import HEADER_BYTES, key_of
from kvstore.network.availability import Availability, one_line
from kvstore.tiers.disk.disk_index import DiskIndex
from kvstore.tiers.disk.segment_writer import DiskSizes, SegmentWriter
from kvstore.tiers.disk.segments import (
    LOCK_NAME,
    PAGE_BYTES,
    SUFFIX,
    SegmentHeader,
    StoredFragment,
    is_full,
    lock_file,
    open_file,
    read_pages,
    scan_segment,
    segment_path,
    whole_pages,
)

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 * 1024 * 1024
_BATCH_BYTES = 4 * 1024 * 1024  # written at once
_REFUSAL_S = 1.0  # how long nothing is written after the disk was full
_LEAST_SEGMENTS = 4  # a small tier has smaller segments: what goes at once is a part of it


@dataclass(frozen=True, slots=True)
class DiskStats:
    """Counters since the process started, and what is there now."""

    is_up: bool
    num_fragments: int
    used_bytes: int
    """Of the segments' files."""
    num_written: int
    num_read: int
    """Fragments that were read and verified."""
    num_refused: int
    """Fragments that were not taken because the disk was full."""
    num_segments_evicted: int
    rejected: Mapping[str, int]
    """Fragments that failed their verification, by reason."""


def least_disk_bytes(max_payload_bytes: int) -> int:
    """Below this bound a disk tier cannot hold fragments of this size."""
    return _LEAST_SEGMENTS * (PAGE_BYTES + _page_bytes(max_payload_bytes))


def _page_bytes(payload_bytes: int) -> int:
    return whole_pages(HEADER_BYTES + payload_bytes + TAG_BYTES)


class DiskTier:
    """Thread-safe. `folder` is this tier's own: files in it that look like segments and are none of ours go."""

    def __init__(
        self,
        folder: Path,
        disk_bytes: int,
        max_payload_bytes: int,
        secret: str,
        clock: Callable[[], float],
        segment_bytes: int = SEGMENT_BYTES,
        compression: str = "none",
    ) -> None:
        """compression: of what is written from now on; both forms are read. Raises ValueError when a segment cannot
        hold the largest payload."""
        self._folder = folder
        self._max_payload_bytes = max_payload_bytes
        max_page_bytes = _page_bytes(max_payload_bytes)
        least_bytes = least_disk_bytes(max_payload_bytes)
        if disk_bytes < least_bytes or max_page_bytes > segment_bytes - PAGE_BYTES:
            raise ValueError(f"disk_bytes: must be at least {least_bytes} for fragments of {max_payload_bytes} bytes")
        segment_bytes = min(segment_bytes, disk_bytes // _LEAST_SEGMENTS) // PAGE_BYTES * PAGE_BYTES
        sizes = DiskSizes(disk_bytes, segment_bytes, max_page_bytes, max(_BATCH_BYTES, max_page_bytes))
        self._batch_bytes = sizes.batch_bytes
        self._authenticator = FragmentAuthenticator(secret)
        self._clock = clock
        self._lock = threading.Lock()  # of the index and the counters; never held during a read or a write
        self._index = DiskIndex()
        self._num_read = self._num_refused = 0
        self._rejected: Counter[str] = Counter()
        self._write_lock = threading.Lock()  # of what follows
        compresses = check_compression(compression)
        self._writer = SegmentWriter(folder, sizes, self._index, self._lock, self._authenticator, compresses)
        self._refuses_until_s = 0.0
        self._lock_file: int | None = None
        self._has_warned = False
        self._read_buffers: dict[int, CopyBuffers] = {}  # by size, a power of two
        self._availability = Availability(f"disk tier in {folder}", _not_yet, self._look, (OSError,))

    @property
    def is_up(self) -> bool:
        """Whether the folder is ours and the disk did what was asked last."""
        return self._availability.is_up

    @property
    def problem(self) -> str:
        """Why nothing is kept here now, in one line; empty while something is."""
        if not self._availability.is_up:
            return f"{self._folder}: {self._availability.problem}"
        return f"{self._folder}: the disk is full" if self._clock() < self._refuses_until_s else ""

    def has(self, key: bytes) -> bool:
        """Whether a fragment of this key is believed to be here."""
        with self._lock:
            return self._index.has(key)

    def write(self, sealed: Sequence[memoryview]) -> int:
        """Keeps fragments, each a verified copy of header and payload, which is changed; how many are here now."""
        with self._write_lock:
            if not self.is_up or self._clock() < self._refuses_until_s:
                return 0
            keys = [key_of(fragment) for fragment in sealed]
            try:
                for key, fragment in dict(zip(keys, sealed, strict=True)).items():  # who sends one twice means one
                    if not self.has(key):
                        self._writer.append(key, fragment)
                self._writer.flush()
            except OSError as error:
                self._write_failed(error, sum(not self.has(key) for key in keys))
            return sum(self.has(key) for key in keys)

    def read(self, key: bytes) -> memoryview | Rejected | None:
        """A verified copy of header and payload; None when absent, Rejected, and dropped, when bad."""
        with self._lock:
            location = self._index.use(key) if self.is_up else None
            if location is None:
                return None
        try:
            copy = self._read(location)
        except OSError as error:
            self._read_failed(key, location, error)
            return None
        sealed = self._verified(copy, key, location)
        with self._lock:
            if isinstance(sealed, Rejected):
                self._rejected[sealed.reason] += 1
                self._index.forget(key, location)
            else:
                self._num_read += 1
        return sealed

    def stats(self) -> DiskStats:
        """The counters now."""
        with self._lock:
            return DiskStats(
                is_up=self.is_up,
                num_fragments=self._index.num_fragments,
                used_bytes=self._index.used_bytes,
                num_written=self._writer.num_written,
                num_read=self._num_read,
                num_refused=self._num_refused,
                num_segments_evicted=self._writer.num_segments_evicted,
                rejected=dict(self._rejected),
            )

    def close(self) -> None:
        """Completes the segment in progress and lets go of the folder; the tier is down from then on."""
        was_up = self.is_up
        self._availability.close()
        with self._write_lock:
            try:
                if was_up:
                    self._writer.complete()
            except OSError as error:
                log.warning("disk tier in %s: %s", self._folder, one_line(error))
            self._writer.abandon()
            self._unlock()

    # -- writing; under the write lock

    def _write_failed(self, error: OSError, num_refused: int) -> None:
        self._writer.abandon()
        if not is_full(error):
            self._availability.lost(error)
        elif self._refuses_until_s == 0.0:
            log.warning("disk tier in %s takes no more fragments: %s", self._folder, one_line(error))
        self._refuses_until_s = self._clock() + _REFUSAL_S
        with self._lock:
            self._num_refused += num_refused

    # -- reading

    def _read(self, location: StoredFragment) -> memoryview:
        size = 1 << (location.num_page_bytes - 1).bit_length()
        buffers = self._read_buffers.get(size)
        if buffers is None:
            buffers = self._read_buffers[size] = CopyBuffers(size, self._batch_bytes)
        target = buffers.take()[: location.num_page_bytes]
        file_descriptor = open_file(segment_path(self._folder, location.segment), os.O_RDONLY)
        try:
            num_read = read_pages(file_descriptor, target, location.offset)
        finally:
            os.close(file_descriptor)
        return target[: min(num_read, location.stored_bytes)]

    def _verified(self, copy: memoryview, key: bytes, location: StoredFragment) -> memoryview | Rejected:
        if len(copy) < location.stored_bytes:
            return Rejected("truncated")
        sealed, tag = copy[:-TAG_BYTES], copy[-TAG_BYTES:]
        content = unseal_stored(sealed, key, location.segment)
        if isinstance(content, Rejected):
            return content
        if not self._authenticator.is_genuine(sealed, tag):
            return Rejected("forged")
        return decompress(sealed, key, self._max_payload_bytes) if is_compressed(sealed) else sealed

    def _read_failed(self, key: bytes, location: StoredFragment, error: OSError) -> None:
        with self._lock:
            # If only its location on the disk is broken, the rest goes on.
            if not self._index.forget(key, location):
                return  # its segment went while it was read
        self._availability.lost(error)

    # -- coming up; by the availability's thread

    def _look(self) -> None:
        """Makes sure that the folder is there and ours, and reads the index anew where it was not."""
        path = self._folder / LOCK_NAME
        if self._lock_file is not None:
            try:
                if os.path.samestat(os.stat(path), os.fstat(self._lock_file)):
                    return
            except FileNotFoundError:
                pass
        try:
            with self._write_lock:
                self._take_folder(path)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                log.warning("disk tier in %s is not available: %s", self._folder, one_line(error))
            raise
        self._has_warned = False

    def _take_folder(self, lock_path: Path) -> None:
        self._writer.abandon()
        self._unlock()
        with self._lock:
            self._index.clear()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = lock_file(lock_path)
        try:
            self._scan()
        except BaseException:
            self._unlock()  # else the next look finds it locked and takes it for ready
            raise

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _scan(self) -> None:
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            found = scan_segment(path, self._authenticator.key_id)
            if found is None:
                path.unlink()
                continue
            header, fragments = found
            self._writer.skip_number(header.number)
            with self._lock:
                self._index.resize(header.number, path.stat().st_size)
                for key, location in fragments:
                    self._index.remember(key, location)
            if not header.end:
                self._repair(path, header, fragments)
        self._writer.make_room(0)

    def _is_whole(self, key: bytes, location: StoredFragment) -> bool:
        try:
            return not isinstance(self._verified(self._read(location), key, location), Rejected)
        except OSError:  # a page that cannot be read is this fragment's loss, not the tier's
            return False

    def _repair(self, path: Path, header: SegmentHeader, found: Sequence[tuple[bytes, StoredFragment]]) -> None:
        """Completes a segment whose writer was killed: what does not verify is dropped."""
        end = PAGE_BYTES
        for key, location in found:
            if self._is_whole(key, location):
                end = location.offset + location.num_page_bytes
            else:
                with self._lock:
                    self._index.forget(key, location)
        if end == PAGE_BYTES:
            with self._lock:
                self._index.remove(header.number)
            path.unlink()
            return
        self._writer.repair(SegmentHeader(header.number, header.key_id, end))


def _not_yet() -> None:
    """Reading an index takes its time: the node does not wait for it."""
    raise OSError(errno.EAGAIN, "not opened yet")
