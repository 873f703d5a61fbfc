"""The arena's file: who may remove it, what a reader gets, and what another process sees."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import HEADER_BYTES
from kvstore.tiers.host.arena import (
    ArenaInUse,
    ArenaMismatch,
    OwnedArena,
    arena_bytes,
    arena_path,
    attach_arena,
    create_arena,
    num_slots_for,
)
from tests.kvstore.fragments import make_fragments
from tests.processes import REPOSITORY, python_environment

FRAGMENT = make_fragments(1)[0]


def create(folder: Path, node_id: str = "node", name: str = "a.arena") -> OwnedArena:
    return create_arena(folder / name, node_id, slot_bytes=1000, num_slots=4)


def test_a_second_mapping_reads_what_the_first_wrote(tmp_path: Path) -> None:
    owned = create(tmp_path)
    other = attach_arena(owned.arena.path, 1000, 4)
    owned.arena.reserve(3, 5)
    assert other.read(3, FRAGMENT.key, 5) == Rejected("stale")
    other.write([3], [FRAGMENT], [5])
    assert owned.arena.read(3, FRAGMENT.key, 5) == FRAGMENT.payload
    owned.remove()


def test_a_copy_is_private(tmp_path: Path) -> None:
    owned = create(tmp_path)
    owned.arena.write([0], [FRAGMENT], [1])
    copy = owned.arena.read(0, FRAGMENT.key, 1)
    owned.arena.write([0], [Fragment(FRAGMENT.key, memoryview(bytes(1000)))], [1])
    assert copy == FRAGMENT.payload
    owned.remove()


def test_slots_do_not_overlap(tmp_path: Path) -> None:
    owned = create(tmp_path)
    fragments = make_fragments(4)
    for slot, fragment in enumerate(fragments):
        owned.arena.write([slot], [fragment], [1])
    for slot, fragment in enumerate(fragments):
        assert owned.arena.read(slot, fragment.key, 1) == fragment.payload
    owned.remove()


def test_a_slot_that_does_not_exist_is_a_bad_layout(tmp_path: Path) -> None:
    owned = create(tmp_path)
    assert owned.arena.read(4, FRAGMENT.key, 1) == Rejected("layout")
    owned.remove()


def test_a_length_beyond_the_slot_is_a_bad_layout(tmp_path: Path) -> None:
    owned = create(tmp_path)
    owned.arena.write([0], [FRAGMENT], [1])
    with open(owned.arena.path, "r+b") as file:
        file.seek(4096 + 16)
        file.write((1 << 60).to_bytes(8, "little"))
    assert owned.arena.read(0, FRAGMENT.key, 1) == Rejected("layout")
    owned.remove()


def test_a_length_that_is_too_short_is_noticed(tmp_path: Path) -> None:
    owned = create(tmp_path)
    owned.arena.write([0], [FRAGMENT], [1])
    with open(owned.arena.path, "r+b") as file:
        file.seek(4096 + 16)
        file.write((500).to_bytes(8, "little"))
    assert owned.arena.read(0, FRAGMENT.key, 1) == Rejected("checksum")
    owned.remove()


def test_a_buffer_larger_than_a_slot_or_a_slot_that_does_not_exist_is_a_bad_layout(tmp_path: Path) -> None:
    owned = create(tmp_path)
    owned.arena.write([3], [FRAGMENT], [1])
    buffers = [memoryview(bytearray(num_bytes)) for num_bytes in (1000, 1001, 1000, 1000)]
    results = owned.arena.read_into([4, 3, 3, -1], [FRAGMENT.key] * 4, [1] * 4, buffers)
    assert results == [Rejected("layout"), Rejected("layout"), None, Rejected("layout")]
    assert buffers[2] == FRAGMENT.payload
    owned.remove()


def test_the_owner_removes_its_file_only(tmp_path: Path) -> None:
    owned = create(tmp_path)
    assert owned.arena.is_current()
    owned.arena.path.unlink()
    owned.arena.path.write_bytes(b"somebody else's")
    assert not owned.arena.is_current()
    owned.remove()
    assert owned.arena.path.exists()


def test_a_live_arena_is_not_taken(tmp_path: Path) -> None:
    owned = create(tmp_path)
    with pytest.raises(ArenaInUse, match="live node process"):
        create(tmp_path)
    with pytest.raises(ArenaInUse, match="live node process"):
        create(tmp_path, name="b.arena")  # the same node id elsewhere
    other = create(tmp_path, node_id="other", name="c.arena")
    assert owned.arena.is_current()
    other.remove()
    owned.remove()


def leave_stale_arena(path: Path, node_id: str) -> None:
    """Makes an arena in a process that is gone afterwards."""
    program = f"""
import os
from pathlib import Path
from kvstore.tiers.host.arena import create_arena
owned = create_arena(Path({str(path)!r}), {node_id!r}, 1000, 4)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=python_environment(), cwd=REPOSITORY)
    assert path.exists()


def test_arenas_of_dead_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    leave_stale_arena(tmp_path / "a.arena", "node")
    leave_stale_arena(tmp_path / "b.arena", "node")
    leave_stale_arena(tmp_path / "c.arena", "other")
    leave_stale_arena(tmp_path / "switchyard-cluster-node", "another")
    (tmp_path / "d.arena").write_bytes(b"not an arena")
    (tmp_path / "e.arena").touch()
    os.mkfifo(tmp_path / "f.arena")
    live = create_arena(tmp_path / "g.arena", "live", 1000, 4)
    owned = create(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.arena", "d.arena", "e.arena", "f.arena", "g.arena"]
    assert owned.arena.is_current()
    assert live.arena.is_current()
    owned.remove()
    live.remove()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_arena_whose_node_removes_it_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    stale, flock = tmp_path / "other.arena", fcntl.flock
    leave_stale_arena(stale, "other")

    def remove_first(file_descriptor: int, how: int) -> None:
        if stale.exists() and os.path.samestat(os.fstat(file_descriptor), stale.stat()):
            stale.unlink()
            if is_replaced:
                stale.write_bytes(b"the next one")
        flock(file_descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    owned = create(tmp_path)
    assert owned.arena.is_current()
    assert stale.exists() == is_replaced
    owned.remove()


def test_a_file_that_is_no_arena_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "a.arena").write_bytes(b"precious")
    with pytest.raises(ArenaInUse, match="is not an arena"):
        create(tmp_path)
    assert (tmp_path / "a.arena").read_bytes() == b"precious"


def test_an_empty_file_of_a_node_that_died_early_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.arena").touch()
    create(tmp_path).remove()


def test_attaching_to_something_else_is_refused(tmp_path: Path) -> None:
    owned = create(tmp_path)
    with pytest.raises(ArenaMismatch, match="not the arena"):
        attach_arena(owned.arena.path, 999, 4)
    with pytest.raises(ArenaMismatch, match="too short"):
        attach_arena(owned.arena.path, 1000, 400)
    with pytest.raises(FileNotFoundError):
        attach_arena(tmp_path / "missing.arena", 1000, 4)
    owned.remove()


def test_memory_is_committed_when_the_file_is_made(tmp_path: Path) -> None:
    owned = create_arena(tmp_path / "a.arena", "node", slot_bytes=1 << 20, num_slots=4)
    status = os.stat(owned.arena.path)
    assert status.st_size == arena_bytes(1 << 20, 4)
    assert status.st_blocks * 512 >= 4 << 20
    owned.remove()


def test_a_file_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        create(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("host_bytes", "slot_bytes"), [(1 << 20, 1000), (1 << 20, 1 << 14), (1 << 20, 1 << 21)])
def test_slots_fit_into_the_budget(host_bytes: int, slot_bytes: int) -> None:
    num_slots = num_slots_for(host_bytes, slot_bytes)
    assert num_slots == 1 or arena_bytes(slot_bytes, num_slots) <= host_bytes
    assert arena_bytes(slot_bytes, num_slots + 1) > host_bytes
    assert num_slots * (slot_bytes + HEADER_BYTES) <= arena_bytes(slot_bytes, num_slots)


def test_the_usual_path_carries_the_node_id() -> None:
    assert arena_path("/dev/shm", "n1") == Path("/dev/shm/switchyard-n1.arena")
