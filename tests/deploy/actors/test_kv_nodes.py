"""What a KV node's actor does on its host before Ray and the node process come into it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from deploy.actors.kv_nodes import slots_that_fit
from deploy.plan import ArenaPlan
from deploy.processes.leftovers import end_predecessor
from kvstore.tiers.host.arena import arena_bytes, arena_holder
from tests.processes import KVNode


@pytest.fixture
def orphan() -> Iterator[KVNode]:
    """A node process without a supervisor."""
    node = KVNode(f"orphan-{os.getpid()}")
    yield node
    node.close()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_node_that_outlived_its_actor_makes_way(
    orphan: KVNode, is_stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arena_holder(orphan.arena) == orphan.pid
    if is_stopped:
        monkeypatch.setattr("deploy.processes.leftovers._PREDECESSOR_S", 0.5)
        os.kill(orphan.pid, signal.SIGSTOP)
    end_predecessor(orphan.arena)
    assert not psutil.pid_exists(orphan.pid)
    assert arena_holder(orphan.arena) == 0
    orphan.restart()
    assert arena_holder(orphan.arena) == orphan.pid


def test_an_arena_that_nobody_holds_is_removed(orphan: KVNode) -> None:
    orphan.kill()
    assert orphan.arena.exists()
    for _ in range(2):
        end_predecessor(orphan.arena)
        assert not orphan.arena.exists()


def test_a_process_that_is_no_node_is_left_alone(orphan: KVNode) -> None:
    with open(orphan.arena, "r+b") as file:
        file.seek(48)  # the pid, behind magic and shape
        file.write(os.getpid().to_bytes(8, "little"))
    assert arena_holder(orphan.arena) == os.getpid()
    end_predecessor(orphan.arena)
    assert psutil.Process(orphan.pid).status() != psutil.STATUS_ZOMBIE
    assert orphan.arena.exists()


@pytest.mark.parametrize("is_folder_large", [True, False])
def test_an_arena_leaves_space_to_others(is_folder_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_bytes = psutil.virtual_memory().available
    free_bytes = 10 * memory_bytes if is_folder_large else 1 << 30
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    num_bytes = arena_bytes(1 << 20, slots_that_fit(ArenaPlan("/dev/shm", 1 << 20, 10**9)))
    wanted = 0.5 * memory_bytes if is_folder_large else 0.8 * free_bytes
    assert num_bytes == pytest.approx(wanted, rel=0.1)
