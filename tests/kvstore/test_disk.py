"""The disk tier alone: bounds, eviction, restarts, a second process, a disk that is full or away, damaged files."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import GENERATION_OFFSET, HEADER_BYTES
from kvstore.tiers.disk.disk import DiskTier
from tests.fault_injector import DiskStorage
from tests.kvstore.fragments import (
    SECRET,
    damage_segments,
    find_stored,
    keys_of,
    make_compressible,
    make_fragments,
    sealed_copy,
)
from tests.processes import REPOSITORY, python_environment, wait_until

SEGMENT_BYTES = 1 << 20
PAYLOAD_BYTES = 100_000  # ten to a segment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def open_disk(folder: Path) -> Iterator[Callable[..., DiskTier]]:
    opened: list[DiskTier] = []

    def open_disk(
        disk_bytes: int = 8 * SEGMENT_BYTES, secret: str = SECRET, where: Path = folder, compression: str = "none"
    ) -> DiskTier:
        disk = DiskTier(where, disk_bytes, PAYLOAD_BYTES, secret, time.monotonic, SEGMENT_BYTES, compression)
        opened.append(disk)
        wait_until(lambda: disk.is_up, "the disk tier is up")
        return disk

    yield open_disk
    for disk in opened:
        disk.close()


def write(disk: DiskTier, fragments: Sequence[Fragment]) -> int:
    return disk.write([sealed_copy(fragment) for fragment in fragments])


def payload_of(sealed: memoryview | Rejected | None) -> memoryview:
    assert isinstance(sealed, memoryview), sealed
    return sealed[HEADER_BYTES:]


def check_all(disk: DiskTier, fragments: Sequence[Fragment]) -> None:
    for fragment in fragments:
        assert payload_of(disk.read(fragment.key)) == fragment.payload


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


def swap(folder: Path, one: Fragment, other: Fragment) -> None:
    path, offset = find_stored(folder, other)
    num_bytes = HEADER_BYTES + other.payload.nbytes + TAG_BYTES
    others = path.read_bytes()[offset : offset + num_bytes]
    damage_segments(folder, one, lambda _: others)


def forged(stored: bytes, payload: bytes) -> bytes:
    """Right in all but the secret."""
    generation = int.from_bytes(stored[GENERATION_OFFSET : GENERATION_OFFSET + 8], "little")
    key = stored[HEADER_BYTES - 22 : HEADER_BYTES]
    sealed = bytes(sealed_copy(Fragment(key, memoryview(payload)), generation))
    return sealed + FragmentAuthenticator("a guess").tag(sealed)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda stored: stored[:500] + bytes([stored[500] ^ 4]) + stored[501:], "checksum"),
        (lambda stored: stored[:-1] + bytes([stored[-1] ^ 1]), "forged"),
        (lambda stored: forged(stored, bytes(1000)), "forged"),
        (lambda stored: stored[:8] + bytes(8) + stored[16:], "stale"),
        (lambda stored: b"SYfrag0\0" + stored[8:], "layout"),
        (lambda stored: stored[:16] + bytes(8) + stored[24:], "truncated"),
        (lambda stored: bytes(len(stored)), "stale"),
    ],
    ids=["flip", "flipped tag", "forged", "stale", "layout", "length", "zeros"],
)
def test_bytes_that_another_process_altered_are_refused_and_counted(
    open_disk: Callable[..., DiskTier], folder: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    disk = open_disk()
    good, bad = make_fragments(2)
    write(disk, [good, bad])
    damage_segments(folder, bad, damage)
    assert disk.read(bad.key) == Rejected(reason)  # type: ignore[arg-type]
    assert disk.read(bad.key) is None
    assert disk.stats().rejected == {reason: 1}
    check_all(disk, [good])
    assert write(disk, [bad]) == 1
    check_all(disk, [bad])


def test_fragments_that_were_swapped_are_refused(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    disk = open_disk()
    one, other = make_fragments(2)
    write(disk, [one, other])
    swap(folder, one, other)
    assert disk.read(one.key) == Rejected("stale")
    check_all(disk, [other])


def test_a_fragment_from_an_older_segment_is_stale(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    """The same fragment, rightly tagged, but not what was written last at this location."""
    first = open_disk()
    (fragment,) = make_fragments(1)
    write(first, [fragment])
    first.close()
    path, offset = find_stored(folder, fragment)
    old = path.read_bytes()[offset : offset + HEADER_BYTES + 1000 + TAG_BYTES]
    path.unlink()
    second = open_disk()
    write(second, [fragment])
    damage_segments(folder, fragment, lambda _: old)
    assert second.read(fragment.key) == Rejected("stale")


def test_a_file_that_was_cut_off_is_truncated(open_disk: Callable[..., DiskTier], folder: Path) -> None:
    disk = open_disk()
    kept, lost = make_fragments(2, PAYLOAD_BYTES)
    write(disk, [kept, lost])
    path, offset = find_stored(folder, lost)
    os.truncate(path, offset + 50_000)
    assert disk.read(lost.key) == Rejected("truncated")
    check_all(disk, [kept])


def test_files_that_are_none_of_ours_are_removed_at_the_start(folder: Path, open_disk: Callable[..., DiskTier]) -> None:
    folder.mkdir()
    (folder / "00000000000000000007.segment").write_bytes(b"something else")
    (folder / "notes.txt").write_text(json.dumps({}))
    disk = open_disk()
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "notes.txt"]
    assert write(disk, make_fragments(1)) == 1


def test_a_bound_too_small_for_a_fragment_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^disk_bytes: must be at least \d+"):
        DiskTier(folder, 100_000, PAYLOAD_BYTES, SECRET, time.monotonic)
