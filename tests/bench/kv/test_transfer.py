"""The benchmark of the KV transfer really transfers: how fast it does is not a test's business."""

import os
from pathlib import Path

import pytest

from bench.kv.transfer import CacheShape, KVTransferFailed, measure_paged_kv_transfer
from tests.processes import REPOSITORY, python_environment
from workers.kv.connector import KVConnector

SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=16, block_size=4, chunk_blocks=(4, 2), num_runs=3)


@pytest.fixture(autouse=True)
def repository_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_environment()["PYTHONPATH"])
    monkeypatch.chdir(REPOSITORY)


def test_rows_and_nothing_left_behind(tmp_path: Path) -> None:
    rows = measure_paged_kv_transfer(str(tmp_path), SHAPE)
    assert [(row.name, row.unit) for row in rows] == [
        ("kv_transfer.paged", "GB/s"),
        ("kv_transfer.paged_share", "of memcpy"),
        ("kv_transfer.paged_in_turn", "GB/s"),
        ("kv_transfer.paged_in_turn_share", "of memcpy"),
    ]
    assert all(len(row.runs) == 3 and min(row.runs) > 0 for row in rows)
    assert rows[0].setting["bytes"] == 2 * 6 * 2 * 2 * 4 * 16 * 2
    assert os.listdir(tmp_path) == []


def test_a_kv_transfer_that_loses_blocks_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poll = KVConnector.poll
    monkeypatch.setattr(KVConnector, "poll", lambda self, transfer_id: poll(self, transfer_id) - 1)
    with pytest.raises(KVTransferFailed, match="not all blocks were published"):
        measure_paged_kv_transfer(str(tmp_path), SHAPE)
