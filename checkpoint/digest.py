"""Digests of whole files, taken once per host and remembered beside what tells that a file has changed.

xxh3-128 reads as fast as a disk does: it finds faults and changes, not forgeries (whoever can write to a model's folder
can have the model say anything). Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from checkpoint.errors import CheckpointError

_PART_BYTES = 256 << 20
_READ_BYTES = 4 << 20
_READERS = 4
_read_here: dict[tuple[Path, str], str] = {}  # digests of this process's own, by path and state
_SETTLED_S = 2.0  # a file changed less than this ago may change again without its times showing it


def files_digest(paths: Sequence[Path]) -> str:
    """Hex digest of the names and all bytes of these files, in their order. Raises CheckpointError."""
    whole = xxhash.xxh3_128()
    for path in paths:
        whole.update(f"{path.name}:{file_digest(path)};".encode())
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """Hex digest of all bytes of a file. Raises CheckpointError."""
    try:
        path = path.resolve(strict=True)
        with _remembered(path) as memory:
            state = _state(path)
            known = memory.get(state) or _read_here.get((path, state))
            if known is not None:
                return known
            digest = _read(path)
            if _state(path) != state:
                raise CheckpointError(f"{path}: changed while it was read")
            if time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > _SETTLED_S:
                memory.put(state, digest)
                _read_here[path, state] = digest
            return digest
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _state(path: Path) -> str:
    """Differs when the file was written or replaced; the change time, too, since the other can be set at will."""
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _read(path: Path) -> str:
    """The digest of the digests of the file's parts, each read by a thread: one thread is slower than a fast disk."""
    parts = range(0, max(1, path.stat().st_size), _PART_BYTES)
    with path.open("rb") as file, ThreadPoolExecutor(_READERS, thread_name_prefix="digest") as readers:
        digests = readers.map(lambda begin: _read_part(file.fileno(), begin), parts)
        return xxhash.xxh3_128_hexdigest("".join(digests))


def _read_part(file: int, begin: int) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
    for offset in range(begin, begin + _PART_BYTES, _READ_BYTES):
        num_bytes = os.preadv(file, [buffer], offset)
        digest.update(buffer[:num_bytes])
        if num_bytes < _READ_BYTES:
            break  # the end of the file, or a file that has become shorter, which its state shows
    return digest.hexdigest()


class _Memory:
    """What is remembered of one file; nothing where there is no folder to remember it in."""

    def __init__(self, file: int | None) -> None:
        self._file = file

    def get(self, state: str) -> str | None:
        """The digest of the file as it is."""
        if self._file is None:
            return None
        try:
            known = json.loads(os.pread(self._file, 4096, 0) or b"{}")
        except ValueError:
            return None
        digest = known.get("digest") if isinstance(known, dict) and known.get("state") == state else None
        return digest if isinstance(digest, str) else None

    def put(self, state: str, digest: str) -> None:
        """Remember it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: it is taken again next time
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, json.dumps({"state": state, "digest": digest}).encode(), 0)


@contextlib.contextmanager
def _remembered(path: Path) -> Iterator[_Memory]:
    """The memory of one file, for one process at a time: the ranks of a host start together and read it once."""
    file = None
    try:
        file = _open_memory(path)
        yield _Memory(file)
    finally:
        if file is not None:
            os.close(file)


def _open_memory(path: Path) -> int | None:
    """A locked file of this user's own; None where there is no home, a read-only one, or one without locks, as in some
    containers."""
    import platformdirs  # only here: an engine with weights of its own, as in benchmarks, reads no files

    file = None
    try:
        folder = platformdirs.user_cache_path("switchyard", appauthor=False) / "digests"
        if not folder.is_absolute():  # a user without a home
            return None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = xxhash.xxh3_128_hexdigest(os.fsencode(path))
        file = os.open(folder / f"{name}.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(file).st_uid == os.geteuid():
            fcntl.flock(file, fcntl.LOCK_EX)
            return file
    except (OSError, RuntimeError):  # the latter: a user without a home, and without a name
        pass
    if file is not None:
        os.close(file)
    return None
