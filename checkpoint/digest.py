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

import platformdirs
import xxhash

from checkpoint.errors import CheckpointError

_READ_BYTES = 8 << 20
_READERS = 4  # files read at once: one thread does not keep a fast disk busy
_SETTLED_S = 2.0  # a file changed less than this ago may change again without its times showing it


def files_digest(paths: Sequence[Path]) -> str:
    """Hex digest of the names and all bytes of these files, in their order. Raises CheckpointError."""
    whole = xxhash.xxh3_128()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="digest") as readers:
        for path, digest in zip(paths, readers.map(file_digest, paths), strict=True):
            whole.update(f"{path.name}:{digest};".encode())
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """Hex digest of all bytes of a file. Raises CheckpointError."""
    try:
        path = path.resolve(strict=True)
        with _remembered(path) as memory:
            state = _state(path)
            if (known := memory.get(state)) is not None:
                return known
            digest = _read(path)
            if _state(path) != state:
                raise CheckpointError(f"{path}: changed while it was read")
            if time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > _SETTLED_S:
                memory.put(state, digest)
            return digest
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _state(path: Path) -> str:
    """Differs when the file was written or replaced; the change time, too, since the other can be set at will."""
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _read(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(view[:num_bytes])
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
    try:
        folder = platformdirs.user_cache_path("switchyard", appauthor=False) / "digests"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = xxhash.xxh3_128_hexdigest(os.fsencode(path))
        file = os.open(folder / f"{name}.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (OSError, RuntimeError):  # a read-only home, or none, as in containers whose user has no name
        yield _Memory(None)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield _Memory(file)
    finally:
        os.close(file)
