"""A step that raises on one rank of several: all of them give it up and go on, and the error says which one it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.workers.failing_ranks import Fault, Outcome, run_with
from tests.workers.tiny_llama import make_checkpoint
from workers.config import EngineConfig
from workers.engine.engine import MAX_FAILED_STEPS

pytestmark = pytest.mark.xdist_group("failed step ranks")  # its fixtures are processes, made once


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("failing"))
    return EngineConfig(
        str(path), "float32", "cpu", block_size=4, num_blocks=96, max_num_batched_tokens=24, max_num_seqs=6
    )


@pytest.fixture(scope="module")
def expected(config: EngineConfig) -> Outcome:
    outcome = run_with(config, None)
    assert set(outcome.reasons.values()) == {"length"}
    return outcome


def check(outcome: Outcome, expected: Outcome, error: str) -> None:
    """Some failed with the error, others of the same time did not, and later ones are served."""
    assert not outcome.failure
    failed = {name for name, reason in outcome.reasons.items() if reason == "step_failed"}
    assert 0 < len(failed) < 6
    assert failed <= set("abcdef")
    assert {outcome.errors[name] for name in failed} == {error}
    for name, tokens in expected.completions.items():
        if name in failed:
            assert outcome.completions[name] == tokens[: len(outcome.completions[name])]
        else:
            assert outcome.completions[name] == tokens
            assert outcome.reasons[name] == "length"


@pytest.mark.parametrize("is_async", [False, True], ids=["waiting", "async"])
def test_one_rank(config: EngineConfig, expected: Outcome, is_async: bool) -> None:
    outcome = run_with(replace(config, async_scheduling=is_async), Fault(0, (2,)))
    check(outcome, expected, "MemoryError: none left for the scores")


@pytest.mark.parametrize(
    ("tp", "pp", "is_async", "rank", "where"),
    [
        pytest.param(2, 1, False, 0, "rank 0 of 2 (tp_rank 0, pp_stage 0)", marks=pytest.mark.slow),
        (2, 1, True, 1, "rank 1 of 2 (tp_rank 1, pp_stage 0)"),
        (1, 2, True, 0, "rank 0 of 2 (tp_rank 0, pp_stage 0)"),
        pytest.param(1, 2, False, 1, "rank 1 of 2 (tp_rank 0, pp_stage 1)", marks=pytest.mark.slow),
        (2, 2, False, 3, "rank 3 of 4 (tp_rank 1, pp_stage 1)"),
    ],
)
def test_of_several_ranks(config, expected, tp, pp, is_async, rank, where) -> None:
    outcome = run_with(replace(config, tp=tp, pp=pp, async_scheduling=is_async), Fault(rank, (2,)))
    check(outcome, expected, f"{where}: MemoryError: none left for the scores")


def test_a_rank_that_raises_when_the_others_wait_for_nothing_more(config: EngineConfig, expected: Outcome) -> None:
    """The logits' rank is alone then: its peers find out with what it owes them next."""
    for tp, pp in ((2, 1), (1, 2)):
        outcome = run_with(replace(config, tp=tp, pp=pp), Fault(1, (2,), is_late=True))
        where = f"rank 1 of 2 (tp_rank {tp - 1}, pp_stage {pp - 1})"
        check(outcome, expected, f"{where}: MemoryError: none left for the logits")


def test_three_in_a_row_end_the_engine(config: EngineConfig) -> None:
    outcome = run_with(replace(config, tp=2), Fault(1, tuple(range(2, 40))))
    assert outcome.failure == (
        f"StepFailed: {MAX_FAILED_STEPS} steps in a row failed; the last:"
        " rank 1 of 2 (tp_rank 1, pp_stage 0): MemoryError: none left for the scores"
    )
