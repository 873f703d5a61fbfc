"""The engine benchmark, rehearsed on the CPU over a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.engine import RandomWeights

ROOT = Path(__file__).resolve().parents[2]


def test_rates_of_decode_and_prefill_are_printed_and_written(tmp_path):
    command = [sys.executable, "-m", "bench.engine", "--shape", "tiny", "--device", "cpu", "--threads", "1"]
    command += ["--batch-sizes", "1", "3", "--context", "48", "--prompt", "200", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()]
    expected = [("decode", 1, 48), ("decode", 3, 48), ("prefill", 1, 200)]
    for rows_of_mode, is_invariant in ((rows[:3], False), (rows[3:], True)):
        assert [(row["name"], row["batch_size"], row["context_tokens"]) for row in rows_of_mode] == expected
        assert all(row["batch_invariant"] is is_invariant and row["graphs"] for row in rows_of_mode)
    assert all(row["same_tokens"] is True for row in rows[3:])
    assert all(row["same_tokens"] in (True, False) for row in rows[:3])
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["share_of_roofline"] > 0
        num_tokens = 200 if row["name"] == "prefill" else row["batch_size"]
        assert row["tokens_per_s"] == pytest.approx(num_tokens / row["step_ms"] * 1000)
    assert done.stdout.count("of the roofline") == 6


def test_without_graphs_nothing_is_compared(tmp_path):
    command = [sys.executable, "-m", "bench.engine", "--shape", "tiny", "--device", "cpu", "--no-graphs"]
    command += ["--no-compile", "--async-scheduling", "--threads", "1", "--modes", "plain"]
    command += ["--batch-sizes", "2", "--context", "20", "--prompt", "40"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()]
    assert [(row["graphs"], row["same_tokens"]) for row in rows] == [(False, None)] * 2
    assert done.stdout.count("(async scheduling)") == 2


def test_a_shape_with_experts_is_timed_without_the_mode_that_it_does_not_have(tmp_path):
    command = [sys.executable, "-m", "bench.engine", "--shape", "tiny-experts", "--device", "cpu", "--threads", "1"]
    command += ["--batch-sizes", "2", "--context", "20", "--prompt", "40", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()]
    assert [(row["name"], row["batch_invariant"]) for row in rows] == [("decode", False), ("prefill", False)]
    assert all(row["share_of_roofline"] > 0 for row in rows)


def test_random_weights_have_the_shards_shape():
    weights = RandomWeights(torch.float32, torch.device("cpu"))
    assert weights.read("norm", (8,)).tolist() == [1.0] * 8
    assert weights.read("w", (8, 6), (slice(2, 5),)).shape == (3, 6)
    assert weights.read("w", (8, 6), (slice(None), slice(0, 3))).shape == (8, 3)
    assert 0.01 < float(weights.read("w", (100, 100)).std()) < 0.03
