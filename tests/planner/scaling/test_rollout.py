"""A plan is carried out as one: order, budget on the way, drains, restarts in mid-plan."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.scaling.actions import READY, Drain, Progress, SetReplicas
from planner.scaling.plan import FLIP, GROW, RETIRE, Plan, Step
from planner.scaling.record import Saved, saved_from_line, to_line
from planner.scaling.rollout import RolloutState, adopt, advance, count_workers
from tests.planner.scaling.fakes import FakeCluster


def is_carried_out(state: RolloutState, progress: Progress) -> bool:
    """Whether every pool has as many ready workers as the plan says, and nothing is under way."""
    if state.plan is None or state.transitions:
        return state.plan is None
    ready = [worker.pool for worker in progress.workers if worker.status == READY]
    quiet = len(ready) == len(progress.workers)
    return quiet and all(ready.count(pool) == count for pool, count in state.plan.targets.items())


def plan(targets: dict[str, int], *steps: Step, max_gpus: int = 16, plan_id: int = 1) -> Plan:
    return Plan(plan_id, targets, steps, dict.fromkeys(targets, 1), max_gpus)


def cluster(drain_s: float = 20.0, **counts: int) -> FakeCluster:
    return FakeCluster(dict.fromkeys(counts, 1), drain_s=drain_s).start_with(counts)


def settle(made: FakeCluster, state: RolloutState, seconds: float = 600.0) -> RolloutState:
    """Tick until the plan is carried out."""
    for _ in range(int(seconds / 5)):
        state, actions = advance(state, made.progress())
        made.act(actions)
        made.pass_time(5.0)
    state, actions = advance(state, made.progress())
    assert actions == ()
    assert is_carried_out(state, made.progress()), made.history
    return state


def ready(made: FakeCluster, *names: str) -> dict[str, int]:
    return {name: made.ready(name) for name in names}


FLIP_PLAN = plan({"prefill": 2, "decode": 4}, Step(FLIP, "prefill", 2, "decode"))


def test_a_flip_drains_switches_under_a_new_epoch_and_is_announced() -> None:
    made = cluster(prefill=4, decode=2)
    settle(made, adopt(RolloutState(), FLIP_PLAN))
    assert ready(made, "prefill", "decode") == {"prefill": 2, "decode": 4}
    flipped = [worker for worker in made.workers if worker.home != worker.pool]
    assert [worker.epoch for worker in flipped] == [2, 2]
    assert made.replicas == {"prefill": 4, "decode": 2}  # Serve is asked for nothing: weights and cache stay
    own = [line for line in made.history if flipped[0].worker_id in line]
    assert [line.split("(")[0] for line in own] == [
        "Drain",
        f"{flipped[0].worker_id} drained",
        "SwitchRole",
        "Announce",
    ]


def test_serve_is_asked_for_fewer_only_when_the_worker_it_ends_has_drained() -> None:
    made = cluster(decode=3)
    settle(made, adopt(RolloutState(), plan({"decode": 1}, Step(RETIRE, "decode", 2))))
    assert made.ended_while_serving == []
    first_shrink = next(i for i, line in enumerate(made.history) if line.startswith("SetReplicas"))
    assert "decode-3 drained" in made.history[:first_shrink]


def test_starting_workers_are_cancelled_before_ready_ones_drain() -> None:
    """ray issue 43034: running replicas were ended before starting ones."""
    made = cluster(decode=2)
    state, actions = advance(adopt(RolloutState(), plan({"decode": 4}, Step(GROW, "decode", 2))), made.progress())
    made.act(actions)
    assert len(made.workers) == 4
    state, actions = advance(adopt(state, plan({"decode": 2}, plan_id=2)), made.progress())
    assert actions == (SetReplicas("decode", 2),)
    made.act(actions)
    assert ready(made, "decode") == {"decode": 2}


def test_what_replaces_a_pool_is_ready_before_it_shrinks() -> None:
    """Mixed workers take over from decode: no decode worker drains until both mixed ones serve."""
    made = cluster(decode=2, mixed=0)
    takeover = plan({"decode": 0, "mixed": 2}, Step(GROW, "mixed", 2), Step(RETIRE, "decode", 2, after=("mixed",)))
    settle(made, adopt(RolloutState(), takeover))
    drains = [i for i, line in enumerate(made.history) if line.startswith("Drain(")]
    arrivals = [i for i, line in enumerate(made.history) if "ready in mixed" in line]
    assert len(drains) == len(arrivals) == 2
    assert max(arrivals) < min(drains)


def test_growth_waits_for_the_gpus_of_what_drains() -> None:
    made = FakeCluster({"prefill": 1, "decode": 2}, drain_s=100.0).start_with({"prefill": 4, "decode": 1})
    moved = Plan(1, {"prefill": 2, "decode": 2}, (), {"prefill": 1, "decode": 2}, 6)
    settle(made, adopt(RolloutState(), moved))
    assert made.most_gpus == 6
    grew = made.history.index("SetReplicas(pool='decode', num_replicas=2)")
    assert {"prefill-4 drained", "prefill-3 drained"} <= set(made.history[:grew])


def test_a_new_plan_brings_draining_workers_back() -> None:
    """Demand returned while two workers drained: they serve again under a new epoch, and nothing is started."""
    made = cluster(drain_s=60.0, decode=4)
    state, actions = advance(adopt(RolloutState(), plan({"decode": 2}, Step(RETIRE, "decode", 2))), made.progress())
    made.act(actions)
    assert ready(made, "decode") == {"decode": 2}
    state = settle(made, adopt(state, plan({"decode": 4}, plan_id=2)))
    assert ready(made, "decode") == {"decode": 4}
    assert len({worker.worker_id for worker in made.workers}) == 4
    assert sorted(worker.epoch for worker in made.workers) == [1, 1, 2, 2]
    assert not [line for line in made.history if line.startswith("SetReplicas")]


def test_a_worker_that_was_to_retire_goes_home_where_it_is_needed() -> None:
    """It flipped to decode, drains to retire, and its first pool needs a worker again: nothing is started."""
    made = cluster(drain_s=60.0, prefill=2, decode=1)
    flipped = plan({"prefill": 1, "decode": 2}, Step(FLIP, "prefill", 1, "decode"))
    state = settle(made, adopt(RolloutState(), flipped))
    state, actions = advance(adopt(state, plan({"prefill": 1, "decode": 0}, plan_id=2)), made.progress())
    made.act(actions)
    assert ready(made, "prefill", "decode") == {"prefill": 1, "decode": 0}
    settle(made, adopt(state, plan({"prefill": 2, "decode": 0}, plan_id=3)))
    assert ready(made, "prefill", "decode") == {"prefill": 2, "decode": 0}
    assert [line for line in made.history if "SetReplicas(pool='prefill'" in line] == []


def test_a_flip_and_a_retirement_drain_one_worker_each() -> None:
    """The oldest flips and the newest retires, as Serve ends the newest: nobody changes places."""
    made = cluster(prefill=4, decode=2)
    both = plan({"prefill": 2, "decode": 3}, Step(FLIP, "prefill", 1, "decode"), Step(RETIRE, "prefill", 1))
    settle(made, adopt(RolloutState(), both))
    assert [line for line in made.history if line.startswith("Drain")] == [
        "Drain(worker_id='prefill-1')",
        "Drain(worker_id='prefill-4')",
    ]


def test_a_worker_that_serve_is_ending_is_not_counted_on() -> None:
    """Serve takes a minute to end a drained worker. The next plan needs it again: a new one is started, since that one
    will be gone, and no more than the budget exist at a time."""
    made = cluster(decode=2)
    made.end_s = 60.0
    state = adopt(RolloutState(), plan({"decode": 1}, Step(RETIRE, "decode", 1), max_gpus=2))
    while "SetReplicas(pool='decode', num_replicas=1)" not in made.history:
        state, actions = advance(state, made.progress())
        made.act(actions)
        made.pass_time(5.0)
    settle(made, adopt(state, plan({"decode": 2}, max_gpus=2, plan_id=2)))
    assert ready(made, "decode") == {"decode": 2}
    assert made.most_gpus == 2


def test_a_lost_call_for_more_does_not_revive_what_serve_is_ending() -> None:
    """Two workers end slowly, the next plan needs more, and the call for them is lost once: those two count for the
    budget until they are gone, and are not announced again."""
    made = cluster(decode=4)
    made.end_s = 60.0
    state = settle(made, adopt(RolloutState(), plan({"decode": 4}, max_gpus=6)), 5.0)
    state = adopt(state, plan({"decode": 2}, Step(RETIRE, "decode", 2), max_gpus=6, plan_id=2))
    while "SetReplicas(pool='decode', num_replicas=2)" not in made.history:
        state, actions = advance(state, made.progress())
        made.act(actions)
        made.pass_time(5.0)
    state, _ = advance(adopt(state, plan({"decode": 6}, max_gpus=6, plan_id=3)), made.progress())
    settle(made, state)
    assert ready(made, "decode") == {"decode": 6}
    assert made.most_gpus <= 6
    assert not [line for line in made.history if line.startswith("Announce")]


def test_a_redeployment_that_reset_the_count_is_corrected() -> None:
    """Ray Serve sets a scaled deployment back to the configuration's number: what was asked for is said again."""
    made = cluster(decode=1)
    state = settle(made, adopt(RolloutState(), plan({"decode": 3}, Step(GROW, "decode", 2))))
    made.replicas["decode"] = 1
    _, actions = advance(state, made.progress())
    assert actions == (SetReplicas("decode", 3),)


def test_an_action_that_got_lost_is_sent_again() -> None:
    made = cluster(prefill=4, decode=2)
    state, first = advance(adopt(RolloutState(), FLIP_PLAN), made.progress())
    state, again = advance(state, made.progress())
    assert [a for a in first if isinstance(a, Drain)] == [a for a in again if isinstance(a, Drain)]
    settle(made, state)


def test_a_cancelled_start_that_became_ready_unheard_drains_first() -> None:
    """The call that cancels two starts got lost, and they came to serve before it is made again."""
    made = cluster(decode=2)
    state, actions = advance(adopt(RolloutState(), plan({"decode": 4}, Step(GROW, "decode", 2))), made.progress())
    made.act(actions)
    state, _ = advance(adopt(state, plan({"decode": 2}, plan_id=2)), made.progress())
    made.pass_time(60.0)
    assert ready(made, "decode") == {"decode": 4}
    settle(made, state)
    assert ready(made, "decode") == {"decode": 2}
    assert made.ended_while_serving == []


def test_a_worker_that_dies_in_mid_flip_is_replaced_by_serve_at_home() -> None:
    made = cluster(prefill=4, decode=2)
    state, actions = advance(adopt(RolloutState(), FLIP_PLAN), made.progress())
    made.act(actions)
    victim = next(worker for worker in made.workers if worker.status == "draining")
    made.workers.remove(victim)
    made._add("prefill")  # Serve's own replacement
    settle(made, state)
    assert ready(made, "prefill", "decode") == {"prefill": 2, "decode": 4}


def test_counts_add_up_in_mid_plan() -> None:
    """Each worker is counted once: a flip where it goes, a retirement where it drains."""
    made = cluster(prefill=4, decode=2)
    mixed_plan = plan({"prefill": 1, "decode": 4}, Step(FLIP, "prefill", 2, "decode"), Step(RETIRE, "prefill", 1))
    state = adopt(RolloutState(), mixed_plan)
    for _ in range(30):
        state, actions = advance(state, made.progress())
        counted = count_workers(state, made.progress())
        total = sum(sum(dataclasses.astuple(counts)) for counts in counted.values())
        assert total == len(made.workers)
        assert counted["decode"].num_ready + counted["decode"].num_flipping_in == 4
        made.act(actions)
        made.pass_time(5.0)


# ---- restarts


PLANS = {
    "flip": (FLIP_PLAN, {"prefill": 4, "decode": 2}),
    "retire": (plan({"prefill": 2, "decode": 1}, Step(RETIRE, "decode", 3)), {"prefill": 2, "decode": 4}),
    "grow": (plan({"prefill": 3, "decode": 3}, Step(GROW, "prefill", 2)), {"prefill": 1, "decode": 3}),
    "all": (
        plan({"prefill": 2, "decode": 5}, Step(FLIP, "prefill", 2, "decode"), Step(GROW, "decode", 1), max_gpus=7),
        {"prefill": 4, "decode": 2},
    ),
}


@pytest.mark.parametrize("remembered", [True, False], ids=["state file", "nothing remembered"])
@pytest.mark.parametrize("name", PLANS)
def test_a_restart_at_any_step_finishes_the_plan(name: str, remembered: bool) -> None:
    """The autoscaler ends after any number of ticks, before or after its actions were sent, and starts anew: with its
    state from JSON, or with the plan alone. The plan is finished, no stream is cut, the budget holds."""
    wanted, counts = PLANS[name]
    for ticks in range(14):
        for sent in (True, False):
            made = cluster(**counts)
            state = adopt(RolloutState(), wanted)
            for tick in range(ticks):
                state, actions = advance(state, made.progress())
                if sent or tick < ticks - 1:
                    made.act(actions)
                made.pass_time(5.0)
            state = saved_from_line(to_line(Saved(rollout=state))).rollout if remembered else RolloutState()
            settle(made, adopt(state, wanted))
            assert ready(made, *wanted.targets) == wanted.targets, (ticks, sent)
            assert made.ended_while_serving == []
            assert made.most_gpus <= wanted.max_gpus


@pytest.mark.parametrize("remembered", [True, False], ids=["state file", "nothing remembered"])
@pytest.mark.parametrize("name", PLANS)
def test_a_restart_at_any_step_undoes_the_plan(name: str, remembered: bool) -> None:
    """After the restart the first decision wants what there was before: everything comes back to that."""
    wanted, counts = PLANS[name]
    back = plan(counts, max_gpus=wanted.max_gpus, plan_id=2)
    for ticks in range(14):
        made = cluster(**counts)
        state = adopt(RolloutState(), wanted)
        for _ in range(ticks):
            state, actions = advance(state, made.progress())
            made.act(actions)
            made.pass_time(5.0)
        state = saved_from_line(to_line(Saved(rollout=state))).rollout if remembered else RolloutState()
        # A flip that is done is undone by a flip, as decide would plan it.
        flips = tuple(Step(FLIP, step.to_pool, step.num_workers, step.pool) for step in wanted.steps if step.to_pool)
        settle(made, adopt(state, dataclasses.replace(back, steps=flips)))
        assert ready(made, *counts) == counts, ticks
        assert made.ended_while_serving == []
        assert made.most_gpus <= wanted.max_gpus


# ---- properties


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
@example(10579, 5)  # the drain of a flip is lost, and the next plan needs the worker where it is
def test_any_sequence_of_plans_keeps_the_budget_and_ends_no_stream(seed: int, extra: int) -> None:
    """Plans follow each other at any time, actions get lost and the autoscaler forgets everything: GPUs stay within the
    budget, Serve ends only workers that start or have drained, no pool has fewer ready workers on the way than before
    and after, and the last plan is carried out."""
    rng = random.Random(seed)
    counts = {"prefill": rng.randrange(1, 5), "decode": rng.randrange(1, 5)}
    max_gpus = sum(counts.values()) + extra
    made = cluster(drain_s=rng.choice([0.0, 20.0, 60.0]), **counts)
    made.startup_s, made.end_s = rng.choice([5.0, 60.0]), rng.choice([0.0, 15.0])
    state = RolloutState()
    for number in range(rng.randrange(1, 6)):
        total = rng.randrange(2, max_gpus + 1)
        prefill = rng.randrange(1, total)
        targets = {"prefill": prefill, "decode": total - prefill}
        pairs = (("prefill", "decode"), ("decode", "prefill"))
        steps = tuple(Step(FLIP, source, 1, to) for source, to in pairs if rng.random() < 0.7)
        state = adopt(state, plan(targets, *steps, max_gpus=max_gpus, plan_id=number + 1))
        before = ready(made, *targets)
        for _ in range(rng.randrange(1, 40)):
            state, actions = advance(state, made.progress())
            if rng.random() < 0.9:
                made.act(actions)
            if rng.random() < 0.02:
                state = RolloutState(plan=state.plan)
            made.pass_time(5.0)
            assert made.most_gpus <= max_gpus
            assert made.ended_while_serving == []
            assert all(made.ready(name) >= min(before[name], targets[name]) for name in targets)
    settle(made, state, 1200)
    assert ready(made, *targets) == targets
    assert made.most_gpus <= max_gpus
    assert made.ended_while_serving == []


@pytest.mark.slow
@settings(max_examples=4_000, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_any_sequence_of_plans_at_length(seed: int, extra: int) -> None:
    """The same, many times."""
    test_any_sequence_of_plans_keeps_the_budget_and_ends_no_stream.hypothesis.inner_test(seed, extra)
