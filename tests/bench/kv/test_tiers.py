"""The benchmark's rows are complete and their numbers belong together; how large they are is not a test's business."""

import os
import shutil
from pathlib import Path

import pytest

from bench.kv.tiers import BandwidthRow, BenchFailed, BenchShape, can_make_hosts, measure_kv_transfer, measure_tier
from kvstore.tiers.memory_tier import MemoryTier
from tests.processes import REPOSITORY, RedisServer, python_environment

SHAPE = BenchShape(fragment_bytes=1024, num_fragments=8, num_runs=3)


def check(row: BandwidthRow) -> None:
    assert (row.num_bytes, row.fragment_bytes, row.num_runs) == (8192, 1024, 3)
    assert 0 < row.worst_gb_per_s <= row.median_gb_per_s <= row.best_gb_per_s


@pytest.mark.redis
def test_all_rows(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_environment()["PYTHONPATH"])
    monkeypatch.chdir(REPOSITORY)
    figures = measure_kv_transfer(str(tmp_path), redis_server.url, SHAPE)
    rows = figures.rows
    assert [row.name for row in rows] == [
        "memcpy",
        "loopback_tcp",
        *("host_put", "host_get", "host_kv_transfer"),
        "peer_get",
        *(("two_hosts_tcp", "two_hosts_peer_get") if can_make_hosts() else ()),
        *("redis_set", "redis_mget"),
        *(("redis_benchmark_set",) if shutil.which("redis-benchmark") else ()),
        "redis_put",
        *(("redis_benchmark_get",) if shutil.which("redis-benchmark") else ()),
        *("redis_get", "redis_kv_transfer"),
    ]
    for row in rows:
        check(row)
    named = {row.name: row for row in rows}
    if shutil.which("redis-benchmark"):
        assert [share.name for share in figures.shares] == ["redis_put_share", "redis_get_share"]
        for share, command in zip(figures.shares, ("set", "get"), strict=True):
            mine, other = named[share.name.removesuffix("_share")], named[f"redis_benchmark_{command}"]
            assert len(share.runs) == 3
            # Each is of one pair of runs, so none is outside of what the slowest and the fastest of both would give.
            assert 0.999 * mine.worst_gb_per_s / other.best_gb_per_s <= min(share.runs)
            assert max(share.runs) <= 1.001 * mine.best_gb_per_s / other.worst_gb_per_s
    assert os.listdir(tmp_path) == []  # the node process is gone and took its arena along


def test_a_kv_transfer_is_slower_than_its_halves() -> None:
    put, get, both = measure_tier(MemoryTier(), SHAPE)
    assert both.best_gb_per_s < min(put.best_gb_per_s, get.best_gb_per_s)


def test_a_tier_that_loses_fragments_has_no_figures() -> None:
    tier = MemoryTier()
    tier.is_up = False
    with pytest.raises(BenchFailed, match="memory tier"):
        measure_tier(tier, SHAPE)
