"""The disk tier alone: bounds, eviction, restarts, compression, a second process."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.tiers.disk.disk import DiskTier
from tests.kvstore.fragments import (
    SECRET,
    keys_of,
    make_compressible,
    make_fragments,
)
from tests.kvstore.tiers.disk.fragments_on_disk import PAYLOAD_BYTES, SEGMENT_BYTES, check_all, write
from tests.processes import REPOSITORY, python_environment, wait_until


def test_stays_within_its_bound_and_the_oldest_go(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    disk = open_disk(4 * SEGMENT_BYTES)
    batches = [make_fragments(10, PAYLOAD_BYTES) for _ in range(12)]
    for batch in batches:
        assert write(disk, batch) == 10
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * SEGMENT_BYTES
    check_all(disk, batches[-1])
    assert not any(disk.has(key) for batch in batches[:8] for key in keys_of(batch))
    stats = disk.stats()
    assert stats.num_written == 120
    assert stats.num_segments_evicted >= 8
    assert stats.used_bytes <= 4 * SEGMENT_BYTES


def test_a_segment_that_is_read_outlives_younger_ones(open_disk: Callable[..., DiskTier]) -> None:
    disk = open_disk(4 * SEGMENT_BYTES)
    old = make_fragments(10, PAYLOAD_BYTES)
    write(disk, old)
    for _ in range(12):
        write(disk, make_fragments(10, PAYLOAD_BYTES))
        check_all(disk, old[:1])
    check_all(disk, old)
    for _ in range(12):
        write(disk, make_fragments(10, PAYLOAD_BYTES))
    assert not any(disk.has(key) for key in keys_of(old))  # it was read no more


def test_what_is_there_already_is_not_written_again(open_disk: Callable[..., DiskTier]) -> None:
    disk = open_disk()
    fragments = make_fragments(3)
    assert write(disk, fragments) == write(disk, fragments) == 3
    assert disk.stats().num_written == 3


def test_survives_a_restart(open_disk: Callable[..., DiskTier]) -> None:
    first = open_disk()
    fragments = make_fragments(25, PAYLOAD_BYTES) + make_fragments(10, 1)
    write(first, fragments)
    first.close()
    second = open_disk()
    assert second.stats().num_fragments == 35
    check_all(second, fragments)
    more = make_fragments(5)
    assert write(second, more) == 5
    check_all(second, more)
    assert second.stats().rejected == {}


def test_compressed_fragments_take_less_and_come_back_whole(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    """After a restart too, beside others, and whatever the setting is then; what would not shrink stays as it is."""
    first = open_disk(compression="zstd")
    numbers, noise = make_compressible(20, PAYLOAD_BYTES), make_fragments(3, PAYLOAD_BYTES)
    assert write(first, [*numbers, *noise]) == 23
    check_all(first, [*numbers, *noise])
    first.close()
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert 3 * PAYLOAD_BYTES < num_bytes < (3 + 20 * 0.75) * PAYLOAD_BYTES
    second = open_disk()
    more = make_compressible(2, PAYLOAD_BYTES)
    assert write(second, more) == 2
    check_all(second, [*numbers, *noise, *more])
    assert second.stats().rejected == {}


def test_one_fragment_sent_twice_is_written_once(open_disk: Callable[..., DiskTier]) -> None:
    disk = open_disk()
    (fragment,) = make_fragments(1)
    write(disk, [fragment, fragment])
    assert disk.stats().num_written == 1


def test_a_smaller_bound_after_a_restart_is_kept(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    first = open_disk(8 * SEGMENT_BYTES)
    fragments = make_fragments(70, PAYLOAD_BYTES)
    write(first, fragments)
    first.close()
    second = open_disk(4 * SEGMENT_BYTES)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * SEGMENT_BYTES
    check_all(second, fragments[-1:])


def test_fragments_of_another_secret_are_removed(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    first = open_disk()
    fragments = make_fragments(3)
    write(first, fragments)
    first.close()
    second = open_disk(secret="another")
    assert second.stats().num_fragments == 0
    assert list(folder.glob("*.segment")) == []


def test_one_process_at_a_time_holds_the_folder(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    first = open_disk()
    fragments = make_fragments(3)
    write(first, fragments)
    program = f"""
import sys, time
from pathlib import Path
from kvstore.tiers.disk.disk import DiskTier
disk = DiskTier(Path({str(folder)!r}), {8 * SEGMENT_BYTES}, {PAYLOAD_BYTES}, {SECRET!r}, time.monotonic)
for line in sys.stdin:
    print(disk.is_up, disk.write([]), flush=True)
"""
    command = [sys.executable, "-c", program]
    environment = python_environment()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def ask() -> str:
            other.stdin.write("?\n")  # type: ignore[union-attr]
            other.stdin.flush()  # type: ignore[union-attr]
            return other.stdout.readline().strip()  # type: ignore[union-attr]

        assert ask() == "False 0"
        check_all(first, fragments)
        first.close()
        wait_until(lambda: ask() == "True 0", "the other process got the folder")
        other.stdin.close()


def test_a_bound_too_small_for_a_fragment_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^disk_bytes: must be at least \d+"):
        DiskTier(folder, 100_000, PAYLOAD_BYTES, SECRET, time.monotonic)
