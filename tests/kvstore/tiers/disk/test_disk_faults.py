"""A disk that is full, slow to come, removed or broken, and processes that die while they write."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.tiers.disk.disk import DiskTier
from tests.cluster.faults.storages import DiskStorage
from tests.kvstore.fragments import (
    SECRET,
    damage_segments,
    keys_of,
    make_compressible,
    make_fragments,
)
from tests.kvstore.tiers.disk.fragments_on_disk import PAYLOAD_BYTES, SEGMENT_BYTES, check_all, payload_of, write
from tests.processes import REPOSITORY, python_environment, wait_until


def test_a_torn_compressed_fragment_is_dropped_at_the_next_start(
    open_disk: Callable[..., DiskTier], folder: Path
) -> None:
    first = open_disk(compression="zstd")
    whole, torn = make_compressible(2, PAYLOAD_BYTES)
    write(first, [whole, torn])
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)  # as after a crash: the segment was not completed
    first.close()
    storage = DiskStorage(copy)
    assert storage.find(keys_of([whole, torn]))
    stored = storage.read(torn.key)
    assert stored is not None
    storage.write(torn.key, stored[: len(stored) // 2])
    second = open_disk(where=copy)
    check_all(second, [whole])
    assert not second.has(torn.key)


def test_a_removed_folder_takes_the_tier_down_until_it_is_made_anew(
    open_disk: Callable[..., DiskTier], folder: Path
) -> None:
    disk = open_disk()
    fragments = make_fragments(3)
    write(disk, fragments)
    shutil.rmtree(folder)
    assert disk.read(fragments[0].key) is None
    assert not disk.is_up
    wait_until(lambda: disk.is_up, "the tier is up again")
    assert not disk.has(fragments[1].key)
    wait_until(lambda: write(disk, fragments) == 3, "fragments are taken again")
    check_all(disk, fragments)


def test_a_folder_that_is_removed_while_it_is_written_to_is_no_error(
    open_disk: Callable[..., DiskTier], folder: Path
) -> None:
    disk = open_disk()
    write(disk, make_fragments(3))
    shutil.rmtree(folder)
    for _ in range(3):
        write(disk, make_fragments(10, PAYLOAD_BYTES))  # a new segment: the folder is missed
    wait_until(lambda: disk.is_up and folder.exists(), "the tier is up again")
    fragments = make_fragments(3)
    wait_until(lambda: write(disk, fragments) == 3, "fragments are taken again")
    check_all(disk, fragments)


def test_a_path_that_cannot_be_made_leaves_the_tier_down(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    disk = DiskTier(tmp_path / "file" / "disk", 8 * SEGMENT_BYTES, PAYLOAD_BYTES, SECRET, time.monotonic)
    assert write(disk, make_fragments(1)) == 0
    (tmp_path / "file").unlink()
    wait_until(lambda: disk.is_up, "the tier came up when its path could be made")
    disk.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a tmpfs")
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mounted)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("may not mount a tmpfs")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_full_disk_bounds_the_tier(open_disk: Callable[..., DiskTier], small_disk: Path) -> None:
    disk = open_disk(64 * SEGMENT_BYTES, where=small_disk / "disk")
    for _ in range(6):
        batch = make_fragments(9, PAYLOAD_BYTES)
        assert write(disk, batch) == 9  # its own oldest segment was removed
        check_all(disk, batch)
    assert disk.stats().num_segments_evicted > 0
    disk.close()


def test_a_disk_that_others_filled_is_refused_and_used_again(
    open_disk: Callable[..., DiskTier], small_disk: Path
) -> None:
    hog = small_disk / "hog"
    disk = open_disk(64 * SEGMENT_BYTES, where=small_disk / "disk")
    hog.write_bytes(bytes(_free_bytes(small_disk)))
    fragments = make_fragments(3)
    assert write(disk, fragments) == 0
    assert disk.is_up
    assert disk.stats().num_refused == 3
    hog.unlink()
    wait_until(lambda: write(disk, fragments) == 3, "fragments are taken again")
    check_all(disk, fragments)
    disk.close()


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_a_limit_on_file_sizes_refuses_and_what_is_there_is_read(open_disk: Callable[..., DiskTier]) -> None:
    disk = open_disk()
    there, refused = make_fragments(3), make_fragments(10, PAYLOAD_BYTES)
    write(disk, there)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES // 2, hard))
    try:
        assert write(disk, refused) < 10
        assert disk.is_up
        check_all(disk, [fragment for fragment in there if disk.has(fragment.key)])
        assert disk.stats().num_refused > 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    wait_until(lambda: write(disk, refused) == 10, "fragments are taken again")
    check_all(disk, refused)


def test_an_error_of_the_device_is_a_miss(open_disk: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here breaks on request: the call is replaced by what the kernel says of one that does."""
    disk = open_disk()
    fragments = make_fragments(3)
    write(disk, fragments)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        assert disk.read(fragments[0].key) is None
        patched.setattr(os, "pwrite", broken)
        wait_until(lambda: disk.is_up, "the tier is up again")
        assert write(disk, make_fragments(3)) == 0
        assert not disk.is_up
    wait_until(lambda: disk.is_up, "the tier is up again")
    check_all(disk, fragments[1:])  # the first one's location counts as broken


KILLED = """
import sys, time
from pathlib import Path
from kvstore.tiers.disk.disk import DiskTier
from tests.kvstore.fragments import SECRET, make_fragments, sealed_copy
disk = DiskTier(Path(sys.argv[1]), 64 << 20, 100_000, SECRET, time.monotonic, 16 << 20)
while not disk.is_up:
    time.sleep(0.01)
while True:
    fragments = make_fragments(10, 100_000)
    disk.write([sealed_copy(fragment) for fragment in fragments])
    for fragment in fragments:
        print(fragment.key.hex(), fragment.payload.hex()[:64], flush=True)
"""


@pytest.mark.parametrize("num_lines", [1, 25, 250])
def test_kill_9_while_writing_loses_no_whole_fragment_and_serves_no_torn_one(
    open_disk: Callable[..., DiskTier], folder: Path, num_lines: int
) -> None:
    environment = python_environment()
    command = [sys.executable, "-c", KILLED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_lines)]
        process.send_signal(signal.SIGKILL)
    disk = open_disk(64 << 20)
    written = dict(line.split() for line in lines)
    for key, beginning in written.items():
        assert payload_of(disk.read(bytes.fromhex(key)))[:32] == bytes.fromhex(beginning)
    assert disk.stats().rejected == {}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 64 << 20
    assert write(disk, make_fragments(1)) == 1


def test_a_torn_end_is_dropped_at_the_next_start(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    first = open_disk()
    whole, torn = make_fragments(2, PAYLOAD_BYTES)
    write(first, [whole, torn])
    shutil.copytree(folder, folder.with_name("copy"))  # as after a crash: the segment was not completed
    first.close()
    damage_segments(folder.with_name("copy"), torn, lambda stored: stored[:50_000] + bytes(len(stored) - 50_000))
    second = open_disk(where=folder.with_name("copy"))
    check_all(second, [whole])
    assert not second.has(torn.key)
    assert second.stats().rejected == {}  # it was never readable
