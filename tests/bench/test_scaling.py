"""Dynamo's former law as control.md gives it, and a comparison of policies on a short trace."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from bench import scaling
from bench.dynamo_law import DynamoLaw
from costs.step_time import StepCost
from planner.scaling.forecast import Trend
from planner.scaling.observation import PoolObservation
from planner.scaling.policies.policy import Learned

COSTS = {"prefill": StepCost(0.02, 1e-4, 0.0, 0.0), "decode": StepCost(0.02, 0.0, 1e-4, 1e-8)}
LEARNED = Learned(arrivals=Trend(0.0, 10.0))


def seen(role: str) -> PoolObservation:
    return PoolObservation(
        name=role,
        role=role,
        num_ready=2,
        uncached_tokens_mean=1000.0,
        context_tokens_mean=1000.0,
        output_tokens_mean=200.0,
        kv_blocks_per_worker=10**6,
        max_num_seqs=1000,
        max_num_batched_tokens=2000,
        num_running=20,
    )


def test_the_laws_prefill_workers_are_demand_over_throughput() -> None:
    """10 prompts a second of 120 ms: 1.2 workers. Half the expected TTFT halves that; more than it changes nothing."""
    law = DynamoLaw(COSTS, 0.05)
    for ttft_s, expected in ((0.0, 2), (0.12, 2), (0.06, 1), (9.0, 2)):
        assert law.want(dataclasses.replace(seen("prefill"), ttft_mean_s=ttft_s), LEARNED).least == expected


def test_the_laws_decode_workers_follow_the_corrected_itl() -> None:
    """By hand: the batch at 50 ms, its tokens a second, and the demand of 2,000; a slower pool gets a smaller batch."""
    per_stream_s = 1e-4 + 1e-8 * 1100
    expected_s = 0.02 + per_stream_s * 10
    for correction in (1.0, 1.5):
        batch = (0.05 / correction - 0.02) / per_stream_s
        tokens_per_s = batch / (0.02 + per_stream_s * batch)
        observed = dataclasses.replace(seen("decode"), tpot_mean_s=expected_s * correction)
        assert DynamoLaw(COSTS, 0.05).want(observed, LEARNED).least == math.ceil(2000 / tokens_per_s)


def test_rows_of_a_short_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every policy has its two rows, and the table a line for each."""
    path = tmp_path / "short.csv"
    path.write_text("t_s,in_tokens,out_tokens\n" + "".join(f"{n / 4},700,60\n" for n in range(1800)))
    workload = scaling.Workload("short", "short.csv", 1, 1000, 60)
    monkeypatch.setattr(scaling, "WORKLOADS", (workload,))
    monkeypatch.setattr(scaling, "_TARGETS", ((1.0,), (16.0,)))
    rows = scaling.measure_scaling(tmp_path, (0,))
    policies = [*scaling.POLICIES, "queue_tuned"]
    assert [row.setting["policy"] for row in rows[::2]] == policies
    assert {row.name for row in rows} == {"scaling.gpu_hours", "scaling.attainment"}
    assert all(0 <= row.median <= 1 for row in rows[1::2])
    assert all(row.median > 0 for row in rows[::2])
    assert len(scaling.table(rows).splitlines()) == 1 + len(policies)
