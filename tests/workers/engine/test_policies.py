"""In which order each policy serves, and that nobody starves under any of them."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from switchyard.v1 import worker_pb2

from tests.fake_model import write_fake_model
from tests.workers.engine.fake_runner import finish_all, make_engine, make_request
from tests.workers.forked_worker import prompt, spec_for, worker
from tests.workers.worker_client import wait_until
from workers.config import POLICIES, EngineConfig, SchedulingOptions
from workers.engine.engine import Engine
from workers.engine.policies.choice import make_policy
from workers.engine.policies.fair_share import FairShare
from workers.engine.policies.orders import ByDeadline, ByPriority
from workers.engine.queues import WaitingQueue
from workers.engine.request import Request

INF = float("inf")
TIMES = st.floats(0, 1000)


def named(name: str, arrival: float, **fields: object) -> Request:
    request = make_request(name, 8, arrival=arrival)
    for field, value in fields.items():
        setattr(request, field, value)
    return request


def order_of(engine: Engine, requests: list[Request]) -> list[str]:
    """Ends of requests that are served one at a time, all of them queued at first."""
    for request in requests:
        engine.submit(request)
    return list(finish_all(engine))


def test_fcfs_serves_by_arrival_whatever_else_is_asked_for():
    engine, _ = make_engine(max_num_seqs=1)
    requests = [named("b", 1.0, priority=-9), named("c", 2.0, deadline_s=3.0), named("a", 0.0, priority=9)]
    assert order_of(engine, requests) == ["a", "b", "c"]


def test_the_smallest_priority_is_served_first_and_equal_ones_by_arrival():
    engine, _ = make_engine(max_num_seqs=1, scheduling=SchedulingOptions(policy="priority"))
    requests = [named("low", 0.0, priority=5), named("b", 2.0), named("a", 1.0), named("high", 3.0, priority=-1)]
    assert order_of(engine, requests) == ["high", "a", "b", "low"]


def test_a_priority_grows_with_age():
    options = SchedulingOptions(policy="priority", priority_ageing_s=2.0)
    engine, _ = make_engine(max_num_seqs=1, scheduling=options)
    requests = [named("old", 0.0, priority=5), named("before", 9.9), named("after", 10.1)]
    assert order_of(engine, requests) == ["before", "old", "after"]


def test_the_earliest_deadline_is_served_first():
    engine, _ = make_engine(max_num_seqs=1, scheduling=SchedulingOptions(policy="deadline", deadline_patience_s=20.0))
    requests = [named("none", 0.0), named("late", 1.0, deadline_s=19.0), named("soon", 2.0, deadline_s=5.0),
                named("far", 0.5, deadline_s=1e9)]  # fmt: skip
    assert order_of(engine, requests) == ["soon", "late", "none", "far"]


@pytest.mark.parametrize(("policy", "fields"), [("priority", {"priority": 9}), ("deadline", {"deadline_s": INF})])
def test_the_last_of_the_policys_order_is_preempted(policy, fields):
    """Not the latest one."""
    options = SchedulingOptions(policy=policy)
    engine, _ = make_engine(num_blocks=7, budget=100, context=28, scheduling=options)
    unimportant = named("unimportant", 0.0, **fields)
    others = [named("x", 1.0, deadline_s=20.0), named("y", 2.0, deadline_s=21.0)]
    for request in (unimportant, *others):
        request.sampling = dataclasses.replace(request.sampling, max_tokens=10)
        engine.submit(request)
    finish_all(engine)
    assert unimportant.num_preemptions > 0
    assert others[0].num_preemptions == 0


@given(
    ageing_s=st.floats(0.1, 100),
    arrivals=st.tuples(TIMES, TIMES),
    priorities=st.tuples(*[st.integers(-1000, 1000)] * 2),
)
def test_who_waits_is_overtaken_by_priority_only_for_so_long(ageing_s, arrivals, priorities):
    """The bound that the class states: nobody starves."""
    policy = ByPriority(ageing_s)
    mine, other = (named(n, a, priority=p) for n, a, p in zip("ab", arrivals, priorities, strict=True))
    if other.arrival_time_s > mine.arrival_time_s + max(0, mine.priority - other.priority) * ageing_s + 1e-6:
        assert policy.order(mine) < policy.order(other)


@given(patience_s=st.floats(0.1, 100), arrivals=st.tuples(TIMES, TIMES), spans=st.tuples(*[st.floats(0.1, 1e6)] * 2))
def test_who_waits_is_overtaken_by_deadline_only_for_so_long(patience_s, arrivals, spans):
    policy = ByDeadline(patience_s)
    mine, other = (named(n, a, deadline_s=a + s) for n, a, s in zip("ab", arrivals, spans, strict=True))
    if other.arrival_time_s > mine.arrival_time_s + patience_s + 1e-6:
        assert policy.order(mine) < policy.order(other)


@pytest.mark.parametrize("policy", ["priority", "deadline"])
def test_a_request_that_everybody_overtakes_is_served_while_more_important_ones_keep_coming(policy):
    """One slot, and a new request each second that the policy prefers: the old one comes when it has aged."""
    options = SchedulingOptions(policy=policy, priority_ageing_s=2.0, deadline_patience_s=20.0)
    engine, _ = make_engine(max_num_seqs=1, scheduling=options)
    engine.submit(named("old", 0.0, priority=10))
    before: set[str] = set()
    for second in range(1, 100):
        engine.submit(named(f"new{second}", float(second), priority=0, deadline_s=second + 0.5))
        for _ in range(4):  # a step for the prompt, and three for the other tokens: one request each second
            events = engine.step()
            ended = {end.request_id for end in events.ended} if events else set()
            if "old" in ended:
                assert 15 <= len(before) <= 22
                return
            before |= ended
    raise AssertionError("it starved")


# ------------------------------------------------------------------------------------------------------- fair share


def share(policy_weights: tuple[float, float] = (1.0, 2.0), **engine: int) -> Engine:
    options = SchedulingOptions(
        policy="fair_share", prompt_token_weight=policy_weights[0], output_token_weight=policy_weights[1]
    )
    return make_engine(scheduling=options, **engine)[0]


def test_one_tenants_flood_does_not_hold_up_another():
    engine = share(max_num_seqs=1)
    flood = [named(f"flood{i}", float(i), tenant=b"f") for i in range(6)]
    assert order_of(engine, [*flood, named("one", 9.0, tenant=b"o")]).index("one") <= 1


def test_a_tenant_saves_up_nothing_while_it_asks_for_nothing():
    """After another one's long time alone it takes turns with it, rather than being served alone as long."""
    engine = share(max_num_seqs=1)
    order_of(engine, [named(f"before{i}", float(i), tenant=b"a") for i in range(20)])
    requests = [named(f"{tenant}{i}", 100.0 + i, tenant=tenant.encode()) for tenant in "ab" for i in range(4)]
    order = order_of(engine, requests)
    for count in range(1, 8):
        turns = Counter(name[0] for name in order[:count])
        assert abs(turns["a"] - turns["b"]) <= 1


def test_a_tenants_requests_are_served_by_arrival():
    engine = share(max_num_seqs=1)
    requests = [named(f"{tenant}{i}", float(9 - i), tenant=tenant.encode()) for tenant in "ab" for i in range(3)]
    order = order_of(engine, requests)
    assert [name for name in order if name[0] == "a"] == ["a2", "a1", "a0"]


SIZES = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 8)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES),
    max_num_seqs=st.integers(1, 4),
    num_blocks=st.integers(8, 20),
    budget=st.integers(4, 40),
    weights=st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([1.0, 2.0])),
)
def test_the_bound_of_fair_share_holds_between_tenants_that_always_have_something_queued(
    sizes, max_num_seqs, num_blocks, budget, weights
):
    """Service counted by this test, from what was admitted and generated; requests are preempted, too."""
    engine = share(weights, max_num_seqs=max_num_seqs, num_blocks=num_blocks, budget=budget, context=32)
    service, seen = Counter(), set()
    history: list[Counter[bytes]] = []
    waiting: Counter[bytes] = Counter()
    count = 0
    for step in range(150):
        for tenant, cycle in zip((b"x", b"y", b"z"), sizes, strict=True):
            waiting[tenant] = sum(r.tenant == tenant for r in engine.scheduler.waiting)
            while waiting[tenant] < 2 * max_num_seqs:
                length, max_tokens = cycle[count % len(cycle)]
                request = make_request(f"r{count}", length, max_tokens, arrival=float(step), ignore_eos=True)
                request.tenant, request.token_ids = tenant, [(count * 7 + i) % 40 for i in range(length)]
                engine.submit(request)
                waiting[tenant] += 1
                count += 1
        events = engine.step()
        for request in list(engine.scheduler.requests.values()):
            if request.was_admitted and request.request_id not in seen:
                seen.add(request.request_id)
                service[request.tenant] += weights[0] * request.num_prompt_tokens
        for request in events.tokens.requests if events else ():
            if request.request_id not in seen:  # admitted and through in one step
                seen.add(request.request_id)
                service[request.tenant] += weights[0] * request.num_prompt_tokens
            service[request.tenant] += weights[1]
        history.append(Counter(service))
    every = [size for cycle in sizes for size in cycle]
    longest, most = max(length for length, _ in every), max(max_tokens for _, max_tokens in every)
    bound = 2 * (weights[0] * longest + weights[1] * max_num_seqs * most)
    for first in (0, 40, 90):
        for last in range(first, 150):
            had = [history[last][tenant] - history[first][tenant] for tenant in (b"x", b"y", b"z")]
            assert max(had) - min(had) <= bound
    assert min(service[tenant] for tenant in (b"x", b"y", b"z")) > 0


def test_counters_of_tenants_that_are_gone_are_dropped():
    policy = FairShare(1.0, 2.0)
    queue = WaitingQueue(policy)
    for i in range(5000):
        request = named(f"r{i}", float(i), tenant=i.to_bytes(2, "big"))
        queue.add(request)
        queue.remove(request)
        policy.admitted(request)
        request.was_admitted = True
        policy.served([request])
    assert len(policy._counters) < 3000


# ------------------------------------------------------------------------------------------------------------ queue


@pytest.mark.parametrize("policy", POLICIES)
@given(
    entries=st.lists(
        st.tuples(st.integers(0, 5), st.integers(-2, 2), st.integers(1, 9), st.integers(0, 2)), max_size=30
    ),
    removed=st.sets(st.integers(0, 29)),
)
def test_a_queue_gives_out_each_request_once_and_in_order(policy, entries, removed):
    made = make_policy(SchedulingOptions(policy=policy))
    queue = WaitingQueue(made)
    requests = [
        named(f"r{i}", float(arrival), priority=priority, deadline_s=arrival + span, tenant=bytes([tenant]))
        for i, (arrival, priority, span, tenant) in enumerate(entries)
    ]
    for request in requests:
        queue.add(request)
    left = [request for i, request in enumerate(requests) if i not in removed]
    for request in requests:
        if request not in left:
            queue.remove(request)
    assert len(queue) == len(left)
    assert queue.num_prompt_tokens == 8 * len(left)
    assert sorted(queue, key=made.order) == sorted(left, key=made.order)
    given_out = list(queue.in_order())
    assert sorted(given_out, key=made.order) == sorted(left, key=made.order)
    for tenant in {made.tenant(request) for request in left}:
        mine = [request for request in given_out if made.tenant(request) == tenant]
        assert mine == sorted(mine, key=made.order)
    for request in queue.in_order():  # taken out one by one, as they are admitted
        queue.remove(request)
    assert len(queue) == 0


def test_a_policy_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match=r"^policy: must be one of fcfs, priority, deadline, fair_share, not 'lifo'"):
        SchedulingOptions(policy="lifo")


# ------------------------------------------------------------------------------------------------------ real workers


@pytest.mark.parametrize(
    ("policy", "options", "expected"),
    [
        ("fcfs", [{}, {}, {}], "abc"),
        ("priority", [{"priority": 2}, {}, {"priority": -2}], "cba"),
        ("deadline", [{}, {"deadline_s": 50.0}, {"deadline_s": 40.0}], "cba"),
        ("fair_share", [{"tenant": b"busy"}, {"tenant": b"busy"}, {"tenant": b"other"}], "cab"),
    ],
)
def test_a_worker_serves_by_the_policy_of_its_configuration(tmp_path, shared_kv_node, policy, options, expected):
    """What a Submit says reaches the policy. One request at a time; these wait while the first one runs."""
    made = spec_for(write_fake_model(tmp_path / "model"), "mixed", shared_kv_node)
    engine = EngineConfig(
        made.engine.model_dir, runner="fake", dtype="float32", block_size=16, num_blocks=64, max_num_seqs=1,
        fake_step_s=0.01, scheduler=SchedulingOptions(policy=policy, priority_ageing_s=1000.0),
    )  # fmt: skip
    with worker(dataclasses.replace(made, engine=engine)) as client:
        client.submit("first", prompt(20, seed=60), worker_pb2.REQUEST_ROLE_MIXED, max_tokens=150, tenant=b"busy")
        wait_until(lambda: client.load().num_running == 1)
        for name, fields in zip("abc", options, strict=True):
            client.submit(name, prompt(20, seed=ord(name)), worker_pb2.REQUEST_ROLE_MIXED, max_tokens=2, **fields)
        wait_until(lambda: client.load().num_waiting == 3)
        for name in "abc":
            client.wait_finished(name)
        assert [name for name in client.finished if name != "first"] == list(expected)
