"""Bytes of the disk tier that another process altered: refused, counted, and written anew."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import GENERATION_OFFSET, HEADER_BYTES
from kvstore.tiers.disk.disk import DiskTier
from tests.kvstore.fragments import (
    damage_segments,
    find_stored,
    make_fragments,
    sealed_copy,
)
from tests.kvstore.tiers.disk.fragments_on_disk import PAYLOAD_BYTES, check_all, write


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
