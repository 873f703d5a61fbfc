"""The search for configurations, as far as it goes without a GPU; and that committed tables serve their launchers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import tuning
from kernels.harness import OPS, tune

ROOT = Path(__file__).resolve().parents[3]
WITH_TABLES = {op.name for op, _ in tune.tunable("")}


def test_neighbours_are_one_step_away_and_within_limits():
    config = {"block_m": 8, "block_n": 256, "num_warps": 4, "num_stages": 3, "shares": 2}
    assert tune.neighbours(config) == [
        {**config, "block_m": 16},
        {**config, "block_n": 128},
        {**config, "num_warps": 8},
        {**config, "num_stages": 2},
        {**config, "num_stages": 4},
        {**config, "shares": 1},
        {**config, "shares": 4},
    ]


def test_a_row_replaces_that_of_its_shape_or_comes_last():
    old = {"shape": {"m": 1}, "config": {"a": 1}, "from": "paper"}
    new = {"shape": {"m": 1}, "config": {"a": 2}, "from": "a device"}
    assert tune.with_row([old], {"m": 1}, {"a": 2}, "a device") == [new]
    assert tune.with_row([old], {"m": 2}, {"a": 2}, "a device") == [old, {**new, "shape": {"m": 2}}]


def test_an_answer_stands_in_for_the_tables_only_inside():
    with tuning.answered_by(lambda op, shape: {op: shape["m"]}):
        assert tuning.config_for("no such table", m=3) == {"no such table": 3}
    with pytest.raises(OSError, match="no such table"):
        tuning.config_for("no such table", m=3)


@pytest.mark.parametrize("name", sorted(WITH_TABLES))
def test_every_full_case_finds_a_row_with_all_that_its_launcher_names(name):
    op = next(op for op in OPS if op.name == name)
    for case in op.full:
        shape, config = tune.current(op, case)
        assert shape
        assert {"num_warps", "num_stages"} <= set(config)
        assert all(size > 0 for size in config.values())


def test_there_are_tables():
    assert {"w4a16_gemm", "fp8_gemm", "fp8_block_gemm", "int8_gemm", "moe_experts"} <= WITH_TABLES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_lists_and_otherwise_says_so():
    command = [sys.executable, "-m", "kernels.harness.tune", "--only", "w4a16_gemm bf16 16x128256"]
    listed = subprocess.run([*command, "--list"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert listed.returncode == 0, listed.stderr
    assert "'m': 16, 'n': 128256, 'k': 4096" in listed.stdout
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert refused.returncode == 2
    assert "no CUDA device" in refused.stderr
