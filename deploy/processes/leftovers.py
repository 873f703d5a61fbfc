"""Run folders: who holds one, and the end of those whose holders were killed, with their arenas and node processes.

    TEMP_DIR/sy-CLUSTER/lock          shared lock of every process that needs the folder; names its host
    TEMP_DIR/sy-CLUSTER/driver        lock of the driver: of `switchyard serve`
    TEMP_DIR/sy-CLUSTER/pools         names of the cluster's pools, which may run on in a Ray cluster that is not ours
    TEMP_DIR/sy-CLUSTER/NODE.arena    path of the arena of this host's KV node

The kernel lets go of a lock when its holder ends, however it ends. Only a folder whose lock file was written by this
module, on this host, is ever removed: a lock does not hold on other hosts of a shared file system. Knows nothing of
Ray.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvstore.tiers.host.arena import ARENA_PREFIX, arena_holder

FOLDER_PREFIX = "sy-"

_NAME = re.compile(rf"{FOLDER_PREFIX}[0-9a-f]{{8}}")
_MARK = f"switchyard run folder of {socket.gethostname()}\n".encode()
_LOCK, _DRIVER, _POOLS = "lock", "driver", "pools"
_RECORD = ".arena"
_PREDECESSOR_S = 10.0  # for a node that has lost its actor to write what is due to its disk, and end
_DYING_S = 5.0  # for a killed driver's processes to end
_LOOK_S = 0.1

log = logging.getLogger(__name__)


def hold_folder(folder: Path) -> int:
    """Make the folder unless it is there, and keep others from removing it until the file descriptor is closed.

    Raises OSError.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own_folder(folder):
            raise PermissionError(errno.EPERM, f"{folder} is not a folder of this user")
        with contextlib.suppress(FileNotFoundError):  # removed in this moment: make it again
            descriptor = _lock(folder / _LOCK)
            if _is_same_file(descriptor, folder / _LOCK):
                os.pwrite(descriptor, _MARK, 0)
                return descriptor
            os.close(descriptor)


def hold_as_driver(folder: Path, pools: Iterable[str]) -> int:
    """Say that the driver of the cluster in a held folder lives, until the file descriptor is closed. Raises OSError.

    pools: names that the cluster's pools will have in Ray.
    """
    (folder / _POOLS).write_text("\n".join(pools))
    return _lock(folder / _DRIVER)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def record_arena(folder: Path, node_id: str, arena: Path) -> None:
    """Note that this arena goes when the folder does."""
    (folder / f"{node_id}{_RECORD}").write_text(str(arena))


def leave_folder(folder: Path, node_id: str) -> None:
    """The node has ended and its arena is gone: remove the folder too, when it is empty."""
    (folder / f"{node_id}{_RECORD}").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [_LOCK]:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A cluster whose driver was killed, while parts of it run on in a Ray cluster that is not ours."""

    cluster_id: str
    pools: tuple[str, ...]


def abandoned(temp_dir: Path) -> list[Abandoned]:
    """Those that had their drivers on this host."""
    found = []
    for folder in _own_folders(temp_dir):
        with contextlib.suppress(OSError):
            pools = tuple((folder / _POOLS).read_text().split())
            if _is_free(folder / _DRIVER) and not _is_free(folder / _LOCK):
                found.append(Abandoned(folder.name.removeprefix(FOLDER_PREFIX), pools))
    return found


def remove_leftovers(temp_dir: Path) -> None:
    """Remove every run folder of this user that no process holds."""
    for folder in _own_folders(temp_dir):
        with contextlib.suppress(OSError):
            _remove_unless_held(folder)


def _own_folders(temp_dir: Path) -> list[Path]:
    """Run folders of this user that were made on this host."""
    found = []
    for folder in sorted(temp_dir.glob(f"{FOLDER_PREFIX}*")):
        with contextlib.suppress(OSError):
            if _NAME.fullmatch(folder.name) and _is_own_folder(folder) and (folder / _LOCK).read_bytes() == _MARK:
                found.append(folder)
    return found


def _is_own_folder(folder: Path) -> bool:
    status = folder.lstat()  # a link may lead anywhere
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _remove_unless_held(folder: Path) -> None:
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _is_left(descriptor, folder):
            log.warning("removing %s, which a cluster that is gone has left", folder)
            remove_folder(folder)
    finally:
        os.close(descriptor)


def _is_left(descriptor: int, folder: Path) -> bool:
    """Whether the lock is free; children of a killed driver have a moment to end."""
    is_dying = (folder / _DRIVER).exists() and _is_free(folder / _DRIVER)
    deadline_s = time.monotonic() + (_DYING_S if is_dying else 0.0)
    while not _take(descriptor):
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_LOOK_S)
    return True


def _is_free(path: Path) -> bool:
    """Whether the file is not locked. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return _take(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a run folder with its arenas, and end the node processes that still hold them. The lock file goes last: a
    removal that is cut short is found again."""
    for record in folder.glob(f"*{_RECORD}"):
        arena = Path(record.read_text())
        if arena.name.startswith(f"{ARENA_PREFIX}{folder.name.removeprefix(FOLDER_PREFIX)}-"):
            end_predecessor(arena)
    for entry in folder.glob("*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _LOCK:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _is_same_file(descriptor: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), path.stat())


# ---- arenas


def end_predecessor(arena: Path) -> None:
    """Ends the node process that holds this arena, and removes what is left of it; its readers keep their mappings.

    A node ends with its actor. One that did not, as when the kernel was out of memory, would keep the host without a
    node for good: workers cannot use a node without a supervisor.
    """
    if pid := arena_holder(arena):
        with contextlib.suppress(psutil.Error):  # it ended by itself, or hangs in the kernel
            _end_node(psutil.Process(pid), arena)
    if not arena_holder(arena):
        with contextlib.suppress(OSError):  # another user's: the node reports that
            arena.unlink(missing_ok=True)


def _end_node(node: psutil.Process, arena: Path) -> None:
    has_it_open = os.path.realpath(arena) in {file.path for file in node.open_files()}  # workers only map it
    if node.uids().real != os.getuid() or not has_it_open:
        return  # any number could be in the file: others may be able to write to the folder
    log.warning("ending the node process %d, which has lost its actor and holds %s", node.pid, arena)
    node.terminate()
    try:
        node.wait(_PREDECESSOR_S)
    except psutil.TimeoutExpired:
        node.kill()
        node.wait(_PREDECESSOR_S)
