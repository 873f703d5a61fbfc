"""Run folders of clusters that are gone, and of those that are not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.processes import leftovers
from deploy.processes.leftovers import (
    Abandoned,
    abandoned,
    hold_folder,
    leave_folder,
    record_arena,
    remove_folder,
    remove_leftovers,
)
from kvstore.tiers.host.arena import arena_holder, create_arena
from tests.processes import KVNode, python_environment

HOLDER = """
import os, sys, time
from pathlib import Path
from deploy.processes.leftovers import hold_as_driver, hold_folder
held = [hold_folder(Path(sys.argv[1]))]
if sys.argv[2:]:
    held.append(hold_as_driver(Path(sys.argv[1]), sys.argv[2:]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def temp_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="left-") as folder:
        yield Path(folder)


def holder(folder: Path, *pools: str) -> subprocess.Popen[str]:
    """A process that holds the folder, as a driver does if pools are given."""
    command = [sys.executable, "-c", HOLDER, str(folder), *pools]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=python_environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_what_a_killed_holder_leaves_is_removed_with_its_arena(temp_dir: Path) -> None:
    folder, arena = temp_dir / "sy-0123abcd", temp_dir / "switchyard-0123abcd-node"
    process = holder(folder, "prefill")
    (folder / "ray" / "logs").mkdir(parents=True)
    (folder / "ray" / "logs" / "raylet.out").write_text("said")
    (folder / "loop").symlink_to(temp_dir)
    os.close(create_arena(arena, "node", 4096, 4)._file_descriptor)  # as a SIGKILL does: the file stays, unlocked
    record_arena(folder, "node", arena)
    remove_leftovers(temp_dir)
    assert arena.exists()
    assert (folder / "ray" / "logs" / "raylet.out").exists()
    process.kill()
    process.communicate()
    remove_leftovers(temp_dir)
    assert list(temp_dir.iterdir()) == []


def test_a_driver_that_is_just_dying_is_waited_for(temp_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temp_dir / "sy-0123abcd"
    driver, other = holder(folder, "prefill", "decode"), holder(folder)
    assert abandoned(temp_dir) == []
    driver.kill()
    driver.communicate()
    monkeypatch.setattr(leftovers, "_DYING_S", 0.5)
    remove_leftovers(temp_dir)
    assert folder.exists()  # another process still needs it
    assert abandoned(temp_dir) == [Abandoned("0123abcd", ("prefill", "decode"))]
    monkeypatch.setattr(leftovers, "_DYING_S", 30.0)
    ending = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    remove_leftovers(temp_dir)
    assert not folder.exists()
    ending.wait(10)
    other.communicate()
    assert abandoned(temp_dir) == []


def test_what_is_not_known_to_be_left_is_left_alone(temp_dir: Path) -> None:
    (temp_dir / "sy-justmade").mkdir()
    (temp_dir / "sy-file").write_text("")
    (temp_dir / "elsewhere").mkdir()
    (temp_dir / "elsewhere" / "lock").write_text("")
    (temp_dir / "sy-link").symlink_to(temp_dir / "elsewhere")
    before = sorted(temp_dir.rglob("*"))
    remove_leftovers(temp_dir)
    remove_leftovers(temp_dir / "nowhere")
    assert sorted(temp_dir.rglob("*")) == before


def test_an_arena_of_another_cluster_is_left_alone(temp_dir: Path) -> None:
    folder, arena = temp_dir / "sy-0123abcd", temp_dir / "switchyard-4567cdef-node"
    os.close(hold_folder(folder))
    arena.write_bytes(b"x")
    record_arena(folder, "node", arena)
    remove_leftovers(temp_dir)
    assert not folder.exists()
    assert arena.exists()


def test_a_node_process_that_still_runs_is_ended(temp_dir: Path) -> None:
    node = KVNode("0123abcd-left")
    try:
        os.close(hold_folder(temp_dir / "sy-0123abcd"))
        record_arena(temp_dir / "sy-0123abcd", "left", node.arena)
        assert arena_holder(node.arena) == node.pid
        remove_leftovers(temp_dir)
        assert not node.arena.exists()
        assert node.terminate() == 0
    finally:
        node.close()


def test_a_folder_that_is_removed_while_it_is_made_is_made_again(
    temp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flock, calls = temp_dir / "sy-0123abcd", leftovers.fcntl.flock, 0

    def removed_meanwhile(descriptor: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            remove_folder(folder)
        flock(descriptor, how)

    monkeypatch.setattr(leftovers.fcntl, "flock", removed_meanwhile)
    descriptor = hold_folder(folder)
    monkeypatch.undo()
    assert calls == 2
    remove_leftovers(temp_dir)
    assert (folder / "lock").exists()
    os.close(descriptor)


def test_a_node_that_ends_takes_a_folder_that_only_it_had(temp_dir: Path) -> None:
    for name, others in (("sy-0123abcd", []), ("sy-4567cdef", ["ray"])):
        folder = temp_dir / name
        descriptor = hold_folder(folder)
        record_arena(folder, "node", temp_dir / "arena")
        for other in others:
            (folder / other).mkdir()
        leave_folder(folder, "node")
        os.close(descriptor)
        assert folder.exists() == bool(others)


def test_cleaning_does_not_wait_for_clusters_that_run(temp_dir: Path) -> None:
    process = holder(temp_dir / "sy-0123abcd", "prefill")
    began_s = time.monotonic()
    remove_leftovers(temp_dir)
    assert time.monotonic() - began_s < 2
    process.kill()
    process.communicate()
