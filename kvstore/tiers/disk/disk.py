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
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.buffers import CopyBuffers
from kvstore.format.compression import check_compression, compress, decompress, is_compressed, unseal_stored
from kvstore.format.fragment import Rejected
from kvstore.format.sealing import HEADER_BYTES, key_of, reseal
from kvstore.network.availability import Availability, one_line
from kvstore.tiers.disk.disk_index import DiskIndex
from kvstore.tiers.disk.segments import (
    LOCK_NAME,
    PAGE_BYTES,
    SUFFIX,
    SegmentHeader,
    StoredFragment,
    complete_segment,
    create_segment,
    is_full,
    lock_file,
    open_file,
    read_pages,
    scan_segment,
    segment_path,
    whole_pages,
    write_all,
)

_LOG = logging.getLogger(__name__)

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


@dataclass(slots=True)
class _Open:
    """The segment that is being written."""

    number: int
    file_descriptor: int
    end: int = PAGE_BYTES


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
        self._disk_bytes = disk_bytes
        self._segment_bytes = min(segment_bytes, disk_bytes // _LEAST_SEGMENTS) // PAGE_BYTES * PAGE_BYTES
        self._max_payload_bytes = max_payload_bytes
        self._compresses = check_compression(compression)
        self._max_page_bytes = _page_bytes(max_payload_bytes)
        least_bytes = least_disk_bytes(max_payload_bytes)
        if disk_bytes < least_bytes or self._max_page_bytes > segment_bytes - PAGE_BYTES:
            raise ValueError(f"disk_bytes: must be at least {least_bytes} for fragments of {max_payload_bytes} bytes")
        self._batch_bytes = max(_BATCH_BYTES, self._max_page_bytes)
        self._authenticator = FragmentAuthenticator(secret)
        self._clock = clock
        # Wall time: numbers of two processes that follow each other in this folder never meet.
        self._next_number = time.time_ns()
        self._lock = threading.Lock()  # of the index and the counters; never held during a read or a write
        self._index = DiskIndex()
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._write_lock = threading.Lock()  # of what follows
        self._open: _Open | None = None
        self._batch = CopyBuffers(self._batch_bytes).take()
        self._staged: list[tuple[bytes, StoredFragment]] = []
        self._staged_bytes = 0
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
                        self._append(key, fragment)
                self._flush()
            except OSError as error:
                self._write_failed(error, sum(not self.has(key) for key in keys))
            return sum(self.has(key) for key in keys)

    def read(self, key: bytes) -> memoryview | Rejected | None:
        """A verified copy of header and payload; None when absent, Rejected, and dropped, when bad."""
        with self._lock:
            place = self._index.use(key) if self.is_up else None
            if place is None:
                return None
        try:
            copy = self._read(place)
        except OSError as error:
            self._read_failed(key, place, error)
            return None
        sealed = self._verified(copy, key, place)
        with self._lock:
            if isinstance(sealed, Rejected):
                self._rejected[sealed.reason] += 1
                self._index.forget(key, place)
            else:
                self._counts["read"] += 1
        return sealed

    def stats(self) -> DiskStats:
        """The counters now."""
        with self._lock:
            return DiskStats(
                is_up=self.is_up,
                num_fragments=self._index.num_fragments,
                used_bytes=self._index.used_bytes,
                num_written=self._counts["written"],
                num_read=self._counts["read"],
                num_refused=self._counts["refused"],
                num_segments_evicted=self._counts["evicted"],
                rejected=dict(self._rejected),
            )

    def close(self) -> None:
        """Completes the segment in progress and lets go of the folder; the tier is down from then on."""
        was_up = self.is_up
        self._availability.close()
        with self._write_lock:
            try:
                if was_up:
                    self._complete()
            except OSError as error:
                _LOG.warning("disk tier in %s: %s", self._folder, one_line(error))
            self._abandon()
            self._unlock()

    # -- writing; under the write lock

    def _append(self, key: bytes, sealed: memoryview) -> None:
        if whole_pages(sealed.nbytes + TAG_BYTES) > self._max_page_bytes:
            return
        compressed = compress(sealed) if self._compresses else None
        if compressed is not None and whole_pages(len(compressed) + TAG_BYTES) < whole_pages(len(sealed) + TAG_BYTES):
            sealed = compressed  # whole pages are saved, or it is not worth its decompression
        num_page_bytes = whole_pages(sealed.nbytes + TAG_BYTES)
        if self._staged_bytes + num_page_bytes > self._batch_bytes:
            self._flush()
        segment = self._open
        if segment is None or segment.end + self._staged_bytes + num_page_bytes > self._segment_bytes:
            self._complete()
            segment = self._start()
        reseal(sealed, segment.number)
        place = StoredFragment(segment.number, segment.end + self._staged_bytes, sealed.nbytes)
        target = self._batch[self._staged_bytes : self._staged_bytes + num_page_bytes]
        target[: sealed.nbytes] = sealed
        target[sealed.nbytes :] = self._authenticator.tag(sealed).ljust(num_page_bytes - sealed.nbytes, b"\0")
        self._staged.append((key, place))
        self._staged_bytes += num_page_bytes

    def _flush(self) -> None:
        segment = self._open
        if segment is None or not self._staged:
            return
        write_all(segment.file_descriptor, self._batch[: self._staged_bytes], segment.end)
        segment.end += self._staged_bytes
        with self._lock:
            for key, place in self._staged:
                self._index.remember(key, place)
            self._counts["written"] += len(self._staged)
        self._staged, self._staged_bytes = [], 0

    def _start(self) -> _Open:
        """Opens the next segment, for which the ones whose turn it is make room."""
        self._evict(lambda _: self._index.used_bytes + self._segment_bytes > self._disk_bytes)
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
        with self._lock:
            self._index.resize(number, self._segment_bytes)
        return self._open

    def _create(self, number: int) -> int:
        key_id = self._authenticator.key_id
        return create_segment(self._folder, number, self._segment_bytes, key_id, self._batch)

    def _complete(self) -> None:
        self._flush()
        segment = self._open
        if segment is None:
            return
        header = SegmentHeader(segment.number, self._authenticator.key_id, segment.end)
        complete_segment(segment.file_descriptor, header, self._batch)
        with self._lock:
            self._index.resize(segment.number, segment.end)
        self._abandon()

    def _abandon(self) -> None:
        """Writes no more to the open segment; what it has can be read."""
        if self._open is not None:
            os.close(self._open.file_descriptor)
        self._open = None
        self._staged, self._staged_bytes = [], 0

    def _write_failed(self, error: OSError, num_refused: int) -> None:
        self._abandon()
        if not is_full(error):
            self._availability.lost(error)
        elif self._refuses_until_s == 0.0:
            _LOG.warning("disk tier in %s takes no more fragments: %s", self._folder, one_line(error))
        self._refuses_until_s = self._clock() + _REFUSAL_S
        with self._lock:
            self._counts["refused"] += num_refused

    # -- reading

    def _read(self, place: StoredFragment) -> memoryview:
        size = 1 << (place.num_page_bytes - 1).bit_length()
        buffers = self._read_buffers.get(size)
        if buffers is None:
            buffers = self._read_buffers[size] = CopyBuffers(size, self._batch_bytes)
        target = buffers.take()[: place.num_page_bytes]
        file_descriptor = open_file(segment_path(self._folder, place.segment), os.O_RDONLY)
        try:
            num_read = read_pages(file_descriptor, target, place.offset)
        finally:
            os.close(file_descriptor)
        return target[: min(num_read, place.stored_bytes)]

    def _verified(self, copy: memoryview, key: bytes, place: StoredFragment) -> memoryview | Rejected:
        if len(copy) < place.stored_bytes:
            return Rejected("truncated")
        sealed, tag = copy[:-TAG_BYTES], copy[-TAG_BYTES:]
        content = unseal_stored(sealed, key, place.segment)
        if isinstance(content, Rejected):
            return content
        if not self._authenticator.is_genuine(sealed, tag):
            return Rejected("forged")
        return decompress(sealed, key, self._max_payload_bytes) if is_compressed(sealed) else sealed

    def _read_failed(self, key: bytes, place: StoredFragment, error: OSError) -> None:
        with self._lock:
            # If only its place on the disk is broken, the rest goes on.
            if not self._index.forget(key, place):
                return  # its segment went while it was read
        self._availability.lost(error)

    def _evict(self, is_wanted: Callable[[int], bool]) -> int:
        """Gives up segments while is_wanted(number gone so far) and there are any; how many went."""
        numbers: list[int] = []
        with self._lock:
            while self._index.num_segments and is_wanted(len(numbers)):
                numbers.append(self._index.evict())
            self._counts["evicted"] += len(numbers)
        for number in numbers:  # without the lock: a disk that hangs must not hold up who looks into the index
            segment_path(self._folder, number).unlink(missing_ok=True)
        return len(numbers)

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
                _LOG.warning("disk tier in %s is not available: %s", self._folder, one_line(error))
            raise
        self._has_warned = False

    def _take_folder(self, lock_path: Path) -> None:
        self._abandon()
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
            self._next_number = max(self._next_number, header.number + 1)
            with self._lock:
                self._index.resize(header.number, path.stat().st_size)
                for key, place in fragments:
                    self._index.remember(key, place)
            if not header.end:
                self._repair(path, header, fragments)
        self._evict(lambda _: self._index.used_bytes > self._disk_bytes)

    def _is_whole(self, key: bytes, place: StoredFragment) -> bool:
        try:
            return not isinstance(self._verified(self._read(place), key, place), Rejected)
        except OSError:  # a page that cannot be read is this fragment's loss, not the tier's
            return False

    def _repair(self, path: Path, header: SegmentHeader, found: Sequence[tuple[bytes, StoredFragment]]) -> None:
        """Completes a segment whose writer was killed: what does not verify is dropped."""
        end = PAGE_BYTES
        for key, place in found:
            if self._is_whole(key, place):
                end = place.offset + place.num_page_bytes
            else:
                with self._lock:
                    self._index.forget(key, place)
        if end == PAGE_BYTES:
            with self._lock:
                self._index.remove(header.number)
            path.unlink()
            return
        file_descriptor = open_file(path, os.O_WRONLY)
        try:
            header = SegmentHeader(header.number, header.key_id, end)
            complete_segment(file_descriptor, header, self._batch)
        finally:
            os.close(file_descriptor)
        with self._lock:
            self._index.resize(header.number, end)


def _not_yet() -> None:
    """Reading an index takes its time: the node does not wait for it."""
    raise OSError(errno.EAGAIN, "not opened yet")
