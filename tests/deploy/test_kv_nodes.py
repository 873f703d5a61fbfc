"""What a KV node's actor does on its host before Ray and the node process come into it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.kv_nodes import end_predecessor, slots_that_fit
from deploy.plan import ArenaPlan
from kvstore.arena import arena_bytes, arena_holder
from tests.processes import KVNode


@pytest.fixture
def orphan() -> Iterator[KVNode]:
    """A node process that nobody watches over."""
    node = KVNode(f"orphan-{os.getpid()}")
    yield node
    node.close()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_node_that_outlived_its_actor_makes_way(
    orphan: KVNode, is_stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arena_holder(orphan.arena) == orphan.pid
    if is_stopped:
        monkeypatch.setattr("deploy.kv_nodes._PREDECESSOR_S", 0.5)
        os.kill(orphan.pid, signal.SIGSTOP)
    end_predecessor(orphan.arena)
    assert not psutil.pid_exists(orphan.pid)
    assert arena_holder(orphan.arena) == 0
    orphan.restart()
    assert arena_holder(orphan.arena) == orphan.pid


def test_an_arena_that_nobody_holds_is_left_alone(orphan: KVNode, tmp_path: Path) -> None:
    orphan.kill()
    end_predecessor(orphan.arena)
    end_predecessor(tmp_path / "none")
    assert orphan.arena.exists()


def test_an_arena_leaves_memory_to_the_workers(tmp_path: Path) -> None:
    num_slots = slots_that_fit(ArenaPlan(str(tmp_path), 1 << 20, 10**9))
    assert 0 < arena_bytes(1 << 20, num_slots) <= 0.55 * psutil.virtual_memory().available
