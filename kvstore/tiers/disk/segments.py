"""One segment of the disk tier: a file of sealed fragments that is written from its beginning to its end, once.

    page 0     magic, number, the secret's id, and where the last fragment ends (0 while the segment is open)
    page 1 ..  fragments, each from the start of a page: header and payload of format.sealing (or that compressed, see
               format.compression), a tag, zeros

A fragment's generation is the number of its segment. Numbers are never used again, so bytes that were brought here from
another segment, or from another life of this folder, are stale. Knows which bytes are where, not what they are for.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore.format.authenticity import TAG_BYTES
from kvstore.format.buffers import ALIGNMENT_BYTES
from kvstore.format.compression import stored_bytes_at
from kvstore.format.sealing import HEADER_BYTES, key_of

PAGE_BYTES = ALIGNMENT_BYTES
SUFFIX = ".segment"
LOCK_NAME = "lock"  # of the file in a tier's folder that its process has locked

_MAGIC = b"SYdisk2\0"
_HEADER = struct.Struct("<8sQ8sQ")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What page 0 says."""

    number: int
    key_id: str
    """Of kvstore.format.authenticity; 8 characters."""
    end: int
    """Where the last fragment ends; 0: the segment was never completed."""


@dataclass(frozen=True, slots=True)
class StoredFragment:
    """Where a fragment is."""

    segment: int
    offset: int
    sealed_bytes: int
    """Header and payload as they are stored, compressed or not; the tag comes behind them."""

    @property
    def stored_bytes(self) -> int:
        """With its tag."""
        return self.sealed_bytes + TAG_BYTES

    @property
    def num_page_bytes(self) -> int:
        """Whole pages that it takes up."""
        return whole_pages(self.stored_bytes)


def whole_pages(num_bytes: int) -> int:
    """Rounded up."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def segment_path(folder: Path, number: int) -> Path:
    """Its file; in the order of names segments are in the order of their age."""
    return folder / f"{number:020d}{SUFFIX}"


def is_full(error: OSError) -> bool:
    """Whether the file system, a quota or a limit has no space left, as opposed to being broken or away."""
    return error.errno in _NO_SPACE


def lock_file(path: Path) -> int:
    """A descriptor that holds an exclusive lock, which ends with the process. Raises OSError when another has it."""
    file_descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file_descriptor)
        raise OSError(errno.EBUSY, "another process holds it") from error
    return file_descriptor


def is_locked(path: Path) -> bool:
    """Whether another process has such a lock now. Raises OSError."""
    if not path.exists():
        return False
    try:
        os.close(lock_file(path))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    return False


def open_file(path: Path, flags: int) -> int:
    """A descriptor past the page cache where the file system can do that, else a usual one.

    The page cache would keep a second copy of what the arena keeps, at the cost of the host's memory.
    """
    flags |= os.O_CLOEXEC
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o600)


def create_segment(folder: Path, number: int, segment_bytes: int, key_id: str, page: memoryview) -> int:
    """A descriptor of a new, open segment that has its disk space already. `page`: a page to write from."""
    path = segment_path(folder, number)
    file_descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file_descriptor, 0, segment_bytes)
        write_header(file_descriptor, SegmentHeader(number, key_id, 0), page)
    except BaseException:
        os.close(file_descriptor)
        path.unlink(missing_ok=True)
        raise
    return file_descriptor


def complete_segment(file_descriptor: int, header: SegmentHeader, page: memoryview) -> None:
    """Gives back what was not used, and says that all before `end` is whole."""
    os.ftruncate(file_descriptor, whole_pages(header.end))
    write_header(file_descriptor, header, page)


def write_header(file_descriptor: int, header: SegmentHeader, page: memoryview) -> None:
    """Writes page 0."""
    page[:PAGE_BYTES] = _HEADER.pack(_MAGIC, header.number, header.key_id.encode(), header.end).ljust(PAGE_BYTES, b"\0")
    write_all(file_descriptor, page[:PAGE_BYTES], 0)


def write_all(file_descriptor: int, pages: memoryview, offset: int) -> None:
    """Writes whole pages."""
    while pages:
        try:
            num_written = os.pwrite(file_descriptor, pages, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _end_direct_io(file_descriptor):
                raise
            continue
        offset += num_written
        pages = pages[num_written:]


def read_pages(file_descriptor: int, target: memoryview, offset: int) -> int:
    """Reads whole pages; fewer bytes than asked for where the file ends."""
    num_read = 0
    while num_read < len(target):
        try:
            count = os.preadv(file_descriptor, [target[num_read:]], offset + num_read)
        except OSError as error:
            if error.errno != errno.EINVAL or not _end_direct_io(file_descriptor):
                raise
            continue
        num_read += count
        if count == 0 or count % PAGE_BYTES:  # the file's end, which may lie within a page
            break
    return num_read


def _end_direct_io(file_descriptor: int) -> bool:
    """For file systems that take the flag and then not our pages; False: it was off already."""
    flags = fcntl.fcntl(file_descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(file_descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


def scan_segment(path: Path, key_id: str) -> tuple[SegmentHeader, list[tuple[bytes, StoredFragment]]] | None:
    """The header, and key and location of each fragment as far as headers follow one another; None: not one of ours.

    Reads headers only, so payloads may be bad all the same: that is found out when they are read.
    """
    with open(path, "rb", buffering=PAGE_BYTES) as file:
        raw = file.read(_HEADER.size)
        if len(raw) < _HEADER.size:
            return None
        magic, number, held_key_id, end = _HEADER.unpack(raw)
        if magic != _MAGIC or held_key_id != key_id.encode() or segment_path(path.parent, number) != path:
            return None
        num_bytes = os.fstat(file.fileno()).st_size
        fragments = list(_fragments(file.fileno(), number, min(end, num_bytes) if end else num_bytes))
        return SegmentHeader(number, key_id, end), fragments


def _fragments(file_descriptor: int, number: int, end: int) -> Iterator[tuple[bytes, StoredFragment]]:
    offset = PAGE_BYTES
    while offset + HEADER_BYTES <= end:
        header = os.pread(file_descriptor, HEADER_BYTES, offset)
        sealed_bytes = stored_bytes_at(header) if len(header) == HEADER_BYTES else 0
        fragment = StoredFragment(number, offset, sealed_bytes)
        if not sealed_bytes or offset + fragment.stored_bytes > end:
            return
        yield key_of(memoryview(header)), fragment
        offset += fragment.num_page_bytes
