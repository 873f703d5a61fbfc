"""A step that raises on one rank: the others' requests go on, and the ranks get their adapters again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers.failing_ranks import Fault, Outcome, run_with
from tests.workers.runtime.test_failed_step_ranks import check
from workers.config import EngineConfig
from workers.engine.adapters.ref import AdapterRef

pytestmark = pytest.mark.xdist_group("failed steps with adapters")  # its fixtures are processes, made once


@pytest.fixture(scope="module")
def config(base: Path) -> EngineConfig:
    return EngineConfig(
        str(base), "float32", "cpu", block_size=4, num_blocks=96, max_num_batched_tokens=24, max_num_seqs=6,
        enable_lora=True, max_loras=3, max_cpu_loras=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wanted(adapters: list[AdapterRef]) -> list[AdapterRef | None]:
    """More than there are slots."""
    return [adapters[0], adapters[1], None, adapters[2], adapters[3]]


@pytest.fixture(scope="module")
def expected(config: EngineConfig, wanted: list[AdapterRef | None]) -> Outcome:
    outcome = run_with(replace(config, max_loras=8, max_cpu_loras=8), None, wanted)
    assert set(outcome.reasons.values()) == {"length"}
    return outcome


@pytest.mark.parametrize(
    ("tp", "pp", "rank", "where"),
    [
        (1, 1, 0, ""),
        (2, 1, 1, "rank 1 of 2 (tp_rank 1, pp_stage 0): "),
        (1, 2, 0, "rank 0 of 2 (tp_rank 0, pp_stage 0): "),
    ],
)
def test_the_others_go_on(
    config: EngineConfig, expected: Outcome, wanted: list[AdapterRef | None], tp: int, pp: int, rank: int, where: str
) -> None:
    outcome = run_with(replace(config, tp=tp, pp=pp), Fault(rank, (), steps=(3,)), wanted)
    check(outcome, expected, f"{where}MemoryError: none left for the scores")
