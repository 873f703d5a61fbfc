"""Decisions are written as JSON lines, replayed to the same plans, and shown as text."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from planner.scaling.decide import ScalingState, decide
from planner.scaling.explain import explain_last, explanation_text
from planner.scaling.observation import Observation
from planner.scaling.record import (
    DecisionLog,
    DecisionRecord,
    LineWriter,
    RecordError,
    Saved,
    Start,
    decisions,
    replay,
    saved_from_line,
    to_line,
)
from planner.scaling.rollout import RolloutState, Transition
from tests.planner.scaling.fakes import FakeCluster, Loop, act, pool, repeat


def demand(now_s: float) -> dict[str, dict[str, object]]:
    """Rises, falls, and is stale and NaN for a while."""
    rate = 40.0 if 200 <= now_s < 600 else 5.0
    figures: dict[str, object] = {"arrivals_per_s": rate}
    if 300 <= now_s < 340:
        figures = {"arrivals_per_s": math.nan, "metrics_age_s": 60.0}
    return {"prefill": figures, "decode": figures}


def record_run(path: Path, restarts: bool = False, max_bytes: int = 10**9) -> Loop:
    """Half an hour in the fake cluster, every decision in a file."""
    cluster = FakeCluster({"prefill": 1, "decode": 1}).start_with({"prefill": 2, "decode": 1})
    loop = Loop(act(max_gpus=9), [pool("prefill"), pool("decode")], cluster, demand)
    log = DecisionLog(path, max_bytes)
    while cluster.now_s < 1800:
        if restarts and cluster.now_s % 250 == 0:
            loop.scaling = saved_from_line(to_line(Saved(loop.scaling, loop.rollout))).scaling
            log = DecisionLog(path, max_bytes)
        start = Start(loop.config, loop.scaling)
        loop.run(10.0)
        seen, plan, explanation = loop.observations[-1], loop.plans[-1], loop.explanations[-1]
        log.write(start, DecisionRecord(explanation.at_s, seen, plan, explanation), loop.scaling)
    return loop


@pytest.mark.parametrize("restarts", [False, True])
def test_a_replay_gives_the_identical_plans(tmp_path: Path, restarts: bool) -> None:
    record_run(tmp_path / "scale.jsonl", restarts)
    lines = (tmp_path / "scale.jsonl").read_text().splitlines()
    read = list(decisions(lines))
    assert len(read) == 180
    assert len({record.plan.plan_id for record in read}) > 3
    assert {part.binding for record in read for part in record.explanation.pools} >= {"hold", "damping"}
    assert list(replay(lines)) == []


def test_a_replay_shows_what_differs(tmp_path: Path) -> None:
    """The plan of one line is changed by hand: its number is told, with both plans."""
    record_run(tmp_path / "scale.jsonl")
    lines = (tmp_path / "scale.jsonl").read_text().splitlines()
    raw = json.loads(lines[40])
    raw["decision"]["plan"]["targets"]["prefill"] += 1
    lines[40] = json.dumps(raw)
    (difference,) = replay(lines)
    assert difference.line == 41
    assert difference.recorded.targets["prefill"] == difference.replayed.targets["prefill"] + 1


def test_a_full_file_is_set_aside_and_the_next_one_replays_alone(tmp_path: Path) -> None:
    record_run(tmp_path / "scale.jsonl", max_bytes=400_000)
    for name in ("scale.jsonl", "scale.jsonl.1"):
        lines = (tmp_path / name).read_text().splitlines()
        assert next(iter(json.loads(lines[0]))) == "start"
        assert list(replay(lines)) == []
    assert (tmp_path / "scale.jsonl.1").stat().st_size < 450_000


def test_a_torn_line_is_left_out_where_the_writer_died(tmp_path: Path) -> None:
    """The last line of a writer that died, before the start line of the next one or at the end."""
    path = tmp_path / "scale.jsonl"
    record_run(path)
    whole = path.read_text()
    lines = whole.splitlines()
    path.write_text("\n".join(lines[:50]) + "\n" + lines[50][:300])
    assert len(list(decisions(path.read_text().splitlines()))) == 49
    (record, *_) = decisions(lines)
    DecisionLog(path).write(Start(act(max_gpus=9), ScalingState()), record, ScalingState())
    assert list(replay(path.read_text().splitlines())) == []
    with pytest.raises(RecordError, match="line 51: not JSON"):
        list(replay([*lines[:50], lines[50][:300], *lines[51:]]))


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    record_run(tmp_path / "whole.jsonl")
    records = list(decisions((tmp_path / "whole.jsonl").read_text().splitlines()))
    path, state = tmp_path / "scale.jsonl", ScalingState()
    log = DecisionLog(path)
    for record in records[:3]:
        if record is records[2]:
            path.rename(tmp_path / "kept.jsonl")
        before = state
        _, state, _ = decide(record.observation, before, record.now_s, act(max_gpus=9))
        log.write(Start(act(max_gpus=9), before), record, state)
    for name in ("kept.jsonl", "scale.jsonl"):
        assert list(replay((tmp_path / name).read_text().splitlines())) == []


def test_a_start_comes_where_another_autoscaler_has_decided_in_between(tmp_path: Path) -> None:
    record_run(tmp_path / "scale.jsonl")
    (record, *_) = decisions((tmp_path / "scale.jsonl").read_text().splitlines())
    own, others, after = ScalingState(), ScalingState(), ScalingState()
    writer = LineWriter()

    def starts(before: ScalingState) -> list[bool]:
        return [line.startswith('{"start"') for line in writer.lines(Start(act(), before), record, after)]

    assert starts(own) == [True, False]
    assert starts(after) == [False]
    assert starts(others) == [True, False]
    assert starts(after) == [False]
    writer.begin_anew()
    assert starts(after) == [True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"start":{"config":{"modus":"act"},"state":{}}}', r"line 1: config\.modus: unknown key"),
        ('{"start":{"config":{"mode":"yes"},"state":{}}}', r"line 1: config\.mode: must be one of"),
        ("[1]", "line 1: neither a start nor a decision"),
        ('{"plan":{}}', "line 1: neither a start nor a decision"),
    ],
)
def test_a_line_that_is_no_record_is_refused(line: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        list(replay([line]))


def test_a_decision_needs_a_start(tmp_path: Path) -> None:
    record_run(tmp_path / "scale.jsonl")
    lines = (tmp_path / "scale.jsonl").read_text().splitlines()
    with pytest.raises(RecordError, match="line 1: a decision before the start"):
        list(replay(lines[1:3]))


def test_what_is_saved_is_read_back() -> None:
    """Both states, with a plan and transitions in them."""
    cluster = FakeCluster({"prefill": 1, "decode": 1}).start_with({"prefill": 4, "decode": 1})
    loop = Loop(act(max_gpus=6), [pool("prefill"), pool("decode")], cluster, demand).run(400)
    rollout = dataclasses.replace(loop.rollout, transitions={"a": Transition("decode"), "b": Transition(released=True)})
    assert isinstance(rollout, RolloutState)
    assert saved_from_line(to_line(Saved(loop.scaling, rollout))) == Saved(loop.scaling, rollout)
    with pytest.raises(RecordError, match="no saved state"):
        saved_from_line(to_line(Start(act(), ScalingState())))


# ---- text


def test_an_explanation_as_text() -> None:
    """What `switchyard scale --explain` prints: the plan, what binds each pool, its terms with units, the actions."""
    seen = [pool("prefill", num_ready=5, arrivals_per_s=12.0), pool("decode", num_ready=1, arrivals_per_s=12.0)]
    plan, _, explanation = repeat(seen, act(max_gpus=8), 60)
    text = explanation_text(explanation, plan).splitlines()
    assert text[0] == "plan 3 at 1970-01-01 00:01:00+00:00 (slo, act): 6 -> 6 of 8 GPUs"
    assert text[1] == "  prefill (prefill): 5 -> 4 workers, 5 -> 4 GPUs"
    assert text[2] == "    damping: 2 needed, 2 enough; shrinks when that lasts 300 s; 1 to decode"
    assert "ttft_objective 500 ms" in text[3]
    assert "arrivals_now 12/s" in text[3]
    assert "horizon 70,000 ms" in text[3]
    assert text[4] == "  decode (decode): 1 -> 2 workers, 1 -> 2 GPUs"
    assert text[5] == "    max_num_seqs: 2 needed; 1 from prefill"
    assert text[-1] == "  actions: 1 of prefill serve in decode"


def test_actions_are_those_that_are_left() -> None:
    """The plan stays while it is carried out: first three are to retire, then they drain, then nothing is left."""
    config = dataclasses.replace(act(), policy="fixed", down_delay_s=0.0, shrink_share=1.0)
    state, said = ScalingState(), []
    for now_s, (num_ready, num_draining) in enumerate([(4, 0), (1, 3), (1, 0)]):
        counts = {"num_ready": num_ready, "num_draining": num_draining, "startup_s": 0.0}
        seen = Observation((pool("decode", configured_workers=1, **counts),))
        plan, state, explanation = decide(seen, state, 10.0 * now_s, config)
        said.append((plan.plan_id, explanation_text(explanation, plan).splitlines()[-1]))
    assert said == [
        (1, "  actions: retire 3 of decode"),
        (1, "  actions: none; under way: 3 of decode drain"),
        (1, "  actions: none"),
    ]


def test_a_pool_at_its_limit_neither_shrinks_nor_grows_later() -> None:
    for busy, limits in ((0.1, {"min_workers": 3}), (60.0, {"max_workers": 3})):
        seen = [pool("decode", num_ready=3, arrivals_per_s=busy, **limits)]
        _, _, explanation = repeat(seen, act(), 0)
        text = "\n".join(part.reason for part in explanation.pools)
        assert "when that lasts" not in text


def test_advice_says_that_nothing_was_done() -> None:
    config = dataclasses.replace(act(), mode="advise")
    plan, _, explanation = repeat([pool("prefill", arrivals_per_s=60.0)], config, 60)
    said = explanation_text(explanation, plan).splitlines()[-1]
    assert said == f"  actions: start {plan.targets['prefill'] - 1} in prefill (advice, not carried out)"


def test_the_last_decisions_of_a_file(tmp_path: Path) -> None:
    record_run(tmp_path / "scale.jsonl")
    lines = (tmp_path / "scale.jsonl").read_text().splitlines()
    text = explain_last(lines, 3)
    assert text.count("plan ") >= 3
    assert text.endswith(explain_last(lines))
    assert explain_last([]) == ""


def test_missing_workers_are_in_the_text() -> None:
    cluster = FakeCluster({"prefill": 1}, most_nodes_gpus=2).start_with({"prefill": 1})
    loop = Loop(act(), [pool()], cluster, lambda now_s: {"prefill": {"arrivals_per_s": 40.0}}).run(900)
    missing = loop.plans[-1].targets["prefill"] - 2
    text = explanation_text(loop.explanations[-1], loop.plans[-1])
    assert f"not reached: {missing} workers missing" in text
