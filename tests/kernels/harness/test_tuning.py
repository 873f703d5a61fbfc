"""Tables of launch configurations: the nearest shape wins, and every committed table can be read."""

import json

import pytest

from kernels import tuning


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_TABLES", tmp_path)
    tuning._nearest.cache_clear()
    yield tmp_path
    tuning._nearest.cache_clear()


def test_the_nearest_shape_wins_in_powers_of_two(tables):
    rows = [
        {"shape": {"m": 1, "n": 4096}, "config": {"block": 16}, "from": "paper"},
        {"shape": {"m": 64, "n": 4096}, "config": {"block": 64}, "from": "paper"},
        {"shape": {"m": 64, "n": 128}, "config": {"block": 32}, "from": "paper"},
    ]
    (tables / "gemm.json").write_text(json.dumps(rows))
    assert tuning.config_for("gemm", m=2, n=4096) == {"block": 16}
    assert tuning.config_for("gemm", m=33, n=5000) == {"block": 64}
    assert tuning.config_for("gemm", m=64, n=200) == {"block": 32}


def test_a_table_without_a_size_that_is_asked_for_is_a_mistake(tables):
    (tables / "gemm.json").write_text(json.dumps([{"shape": {"m": 1}, "config": {}, "from": "paper"}]))
    with pytest.raises(KeyError, match="'k'"):
        tuning.config_for("gemm", m=1, k=2)
