"""The shared-memory arena of a host: a plain file, mapped by the node process and by every worker.

    page 0      ArenaHeader: what this file is, and its shape
    slot i      at 4096 + i * stride: the 64-byte header of kvstore.format.sealing, then up to slot_bytes of payload

The node process holds an exclusive lock on the file as long as it lives; the kernel lets go of it when the process is
killed, which is how a new node recognises a stale file. The file is unlinked, never shortened: a worker's mapping
stays valid (and useless) after the node is gone. Knows which bytes are where, not which slot holds which fragment.
"""

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvstore.format.buffers import CopyBuffers
from kvstore.format.copying import Bytes
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import (
    HEADER_BYTES,
    generation_at,
    payload_bytes_at,
    reseal,
    reserve_at,
    seal_all_into,
    unseal,
    unseal_into,
)

ARENA_PREFIX = "switchyard-"
ARENA_SUFFIX = ".arena"

_MAGIC = b"switchyard-arena-1\0"
_FIRST_SLOT_OFFSET = 4096
_SLOT_ALIGNMENT = 64
_ARENA_HEADER = struct.Struct("<32sQQQ256s")  # magic, then the fields of _ArenaHeader


class _ArenaHeader(NamedTuple):
    slot_bytes: int
    num_slots: int
    pid: int
    node_id: bytes


class ArenaInUse(Exception):
    """A live node process has this arena, or another one under this node id."""


class ArenaMismatch(Exception):
    """The file is not the arena that was announced; the node process has been replaced meanwhile."""


class Arena:
    """One mapping of an arena's file. Made by create_arena() or attach_arena()."""

    def __init__(self, path: Path, file_descriptor: int, slot_bytes: int, num_slots: int) -> None:
        self.path = path
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._stride = _stride(slot_bytes)
        self._file_id = _file_id(os.fstat(file_descriptor))
        self._buffers = CopyBuffers(HEADER_BYTES + slot_bytes, page_at=HEADER_BYTES)
        # Populated at once: a page fault on first touch costs more than the copy of the page.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._view = memoryview(mmap.mmap(file_descriptor, arena_bytes(slot_bytes, num_slots), flags=flags))

    def is_current(self) -> bool:
        """Whether the path still leads to the file that is mapped here."""
        try:
            return _file_id(os.stat(self.path)) == self._file_id
        except OSError:
            return False

    def reserve(self, slot: int, generation: int) -> None:
        """Invalidates the slot's content for readers that have its older generation."""
        reserve_at(self._view, self._offset(slot), generation)

    def is_reserved_as(self, slot: int, generation: int) -> bool:
        """Whether this mapping shows the reservation: the slot may be written to, and has not been reserved again."""
        return 0 <= slot < self.num_slots and generation_at(self._view, self._offset(slot)) == generation

    def write(self, slots: Sequence[int], fragments: Sequence[Fragment], generations: Sequence[int]) -> None:
        """Fills reserved slots."""
        regions = [
            self._sealed_region(slot, fragment.num_bytes) for slot, fragment in zip(slots, fragments, strict=True)
        ]
        payloads, keys = [fragment.payload for fragment in fragments], [fragment.key for fragment in fragments]
        seal_all_into(regions, payloads, keys, generations)

    def read_into(
        self, slots: Sequence[int], keys: Sequence[bytes], generations: Sequence[int], buffers: Sequence[Bytes]
    ) -> list[Rejected | None]:
        """Copies payloads into buffers of this process, which hold anything unless the copy is right: None."""
        results: list[Rejected | None] = [Rejected("layout")] * len(slots)
        fitting = [
            i for i, slot in enumerate(slots) if 0 <= slot < self.num_slots and buffers[i].nbytes <= self.slot_bytes
        ]
        copied = unseal_into(
            [buffers[i] for i in fitting],
            [self._sealed_region(slots[i], buffers[i].nbytes) for i in fitting],
            [keys[i] for i in fitting],
            [generations[i] for i in fitting],
        )
        for i, result in zip(fitting, copied, strict=True):
            results[i] = result
        return results

    def read(self, slot: int, key: bytes, generation: int) -> memoryview | Rejected:
        """A verified private copy of the payload."""
        sealed = self.read_sealed(slot, key, generation)
        return sealed if isinstance(sealed, Rejected) else sealed[HEADER_BYTES:]

    def read_sealed(self, slot: int, key: bytes, generation: int) -> memoryview | Rejected:
        """A verified private copy of header and payload."""
        view = self.sealed_view(slot, key, generation)
        if isinstance(view, Rejected):
            return view
        copy = self._buffers.take()[: len(view)]
        copy[:] = view
        if generation_at(view, 0) != generation:  # the slot was given away while it was copied
            return Rejected("stale")
        payload = unseal(copy, key, generation)
        return payload if isinstance(payload, Rejected) else copy

    def sealed_view(self, slot: int, key: bytes, generation: int) -> memoryview | Rejected:
        """Header and payload as they lie in the slot; nothing but the header's fields is verified."""
        if not 0 <= slot < self.num_slots:
            return Rejected("layout")
        payload_bytes = payload_bytes_at(self._view, self._offset(slot), key, generation)
        if isinstance(payload_bytes, Rejected):
            return payload_bytes
        if payload_bytes > self.slot_bytes:
            return Rejected("layout")
        return self._sealed_region(slot, payload_bytes)

    def adopt(self, slot: int, sealed: memoryview, generation: int) -> None:
        """Fills a reserved slot with a verified copy of header and payload, whose generation is changed."""
        reseal(sealed, generation)
        region = self._sealed_region(slot, len(sealed) - HEADER_BYTES)
        region[HEADER_BYTES:] = sealed[HEADER_BYTES:]
        region[:HEADER_BYTES] = sealed[:HEADER_BYTES]  # last: until then the slot holds nothing

    def _sealed_region(self, slot: int, payload_bytes: int) -> memoryview:
        """Header and payload."""
        start = self._offset(slot)
        return self._view[start : start + HEADER_BYTES + payload_bytes]

    def _offset(self, slot: int) -> int:
        return _FIRST_SLOT_OFFSET + slot * self._stride


class OwnedArena:
    """The node process's hold on the arena: the lock and, at the end, the file's removal."""

    def __init__(self, arena: Arena, file_descriptor: int) -> None:
        self.arena = arena
        self._file_descriptor = file_descriptor

    def remove(self) -> None:
        """Unlinks the file and lets go of the lock."""
        if self.arena.is_current():
            self.arena.path.unlink()
        os.close(self._file_descriptor)


def arena_path(arena_dir: str, node_id: str) -> Path:
    """The usual path of a node's arena."""
    return Path(arena_dir) / f"{ARENA_PREFIX}{node_id}{ARENA_SUFFIX}"


def arena_bytes(slot_bytes: int, num_slots: int) -> int:
    """Size of the file."""
    return _FIRST_SLOT_OFFSET + num_slots * _stride(slot_bytes)


def num_slots_for(host_bytes: int, slot_bytes: int) -> int:
    """How many slots fit into a budget; at least one."""
    return max(1, (host_bytes - _FIRST_SLOT_OFFSET) // _stride(slot_bytes))


def create_arena(path: Path, node_id: str, slot_bytes: int, num_slots: int) -> OwnedArena:
    """Makes and locks the file; arenas that dead node processes left behind in the folder are removed first.

    Its memory is committed here: without that, a full tmpfs would kill whichever process writes next. Raises ArenaInUse
    when another node process is alive, OSError when there is no space.
    """
    neighbours = (*path.parent.glob(f"*{ARENA_SUFFIX}"), *path.parent.glob(f"{ARENA_PREFIX}*"))
    for candidate in sorted({path, *neighbours}):
        _remove_if_stale(candidate, path, node_id)
    try:
        file_descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise ArenaInUse(f"{path} belongs to another node process") from error
    try:
        fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        header = _ARENA_HEADER.pack(_MAGIC, slot_bytes, num_slots, os.getpid(), node_id.encode())
        os.pwrite(file_descriptor, header, 0)
        _commit(file_descriptor, arena_bytes(slot_bytes, num_slots))
        return OwnedArena(Arena(path, file_descriptor, slot_bytes, num_slots), file_descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(file_descriptor)
        raise


def arena_holder(path: Path) -> int:
    """The node process that made this arena, if one holds it; 0 when none does."""
    try:
        file_descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        header = _read_header(file_descriptor)
        fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0 if header is None else header.pid
    except OSError:
        return 0
    finally:
        os.close(file_descriptor)
    return 0


def attach_arena(path: Path, slot_bytes: int, num_slots: int) -> Arena:
    """Maps the arena that a node process announced. Raises ArenaMismatch or OSError when it is not there."""
    file_descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        header = _read_header(file_descriptor)
        if os.fstat(file_descriptor).st_size < arena_bytes(slot_bytes, num_slots):
            raise ArenaMismatch(f"{path} is too short")
        if header is None or header[:2] != (slot_bytes, num_slots):
            raise ArenaMismatch(f"{path} is not the arena that the node announced")
        return Arena(path, file_descriptor, slot_bytes, num_slots)
    finally:
        os.close(file_descriptor)  # the mapping has its own reference


def _remove_if_stale(candidate: Path, path: Path, node_id: str) -> None:
    """Unlinks an arena that no process holds: its fragments cannot be found any more. Leaves all else alone."""
    try:
        if not candidate.is_file():
            return
        file_descriptor = os.open(candidate, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # not there, or another user's
    try:
        header = _read_header(file_descriptor)
        is_same_node = header is not None and header.node_id == node_id.encode()
        if candidate == path and header is None and os.fstat(file_descriptor).st_size:
            raise ArenaInUse(f"{path} exists and is not an arena")
        if header is None and candidate != path:
            return
        fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):  # its node may have removed it meanwhile, or have made another
            if os.path.samestat(os.fstat(file_descriptor), os.stat(candidate)):
                candidate.unlink()
    except BlockingIOError as error:
        if is_same_node or candidate == path:
            raise ArenaInUse(f"a live node process holds {candidate}") from error
    finally:
        os.close(file_descriptor)


def _read_header(file_descriptor: int) -> _ArenaHeader | None:
    """None for a file that is no arena, or not yet one."""
    raw = os.pread(file_descriptor, _ARENA_HEADER.size, 0)
    if len(raw) < _ARENA_HEADER.size or not raw.startswith(_MAGIC):
        return None
    _, slot_bytes, num_slots, pid, node_id = _ARENA_HEADER.unpack(raw)
    return _ArenaHeader(slot_bytes, num_slots, pid, node_id.rstrip(b"\0"))


def _commit(file_descriptor: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file_descriptor, 0, num_bytes)
    else:  # macOS has no call for it, and no tmpfs that could be full
        os.ftruncate(file_descriptor, num_bytes)


def _stride(slot_bytes: int) -> int:
    return -(-(HEADER_BYTES + slot_bytes) // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


def _file_id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
