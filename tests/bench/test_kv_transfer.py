"""The benchmark of the hand-off really hands off: how fast it does is not a test's business."""

import os
from pathlib import Path

import pytest

from bench.kv_transfer import BlockMover, CacheShape, HandOffFailed, measure_paged_hand_off
from tests.processes import REPOSITORY, python_environment

SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=16, block_size=4, chunk_blocks=(4, 2), num_runs=3)


@pytest.fixture(autouse=True)
def repository_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_environment()["PYTHONPATH"])
    monkeypatch.chdir(REPOSITORY)


def test_rows_and_nothing_left_behind(tmp_path: Path) -> None:
    rows = measure_paged_hand_off(str(tmp_path), SHAPE)
    assert [(row.name, row.unit) for row in rows] == [
        ("handoff.paged", "GB/s"),
        ("handoff.paged_share", "of memcpy"),
        ("handoff.paged_in_turn", "GB/s"),
        ("handoff.paged_in_turn_share", "of memcpy"),
    ]
    assert all(len(row.runs) == 3 and min(row.runs) > 0 for row in rows)
    assert rows[0].setting["bytes"] == 2 * 6 * 2 * 2 * 4 * 16 * 2
    assert os.listdir(tmp_path) == []


def test_a_hand_off_that_loses_blocks_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlockMover.store
    monkeypatch.setattr(BlockMover, "store", lambda self, chunk: store(self, chunk) - 1)
    with pytest.raises(HandOffFailed, match="not all blocks were published"):
        measure_paged_hand_off(str(tmp_path), SHAPE)
