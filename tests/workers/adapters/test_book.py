"""Which adapters are where: every request gets its own, whatever is paged, preempted or fails; nobody starves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.adapters.paged_adapters import make, ref
from tests.workers.engine.test_async_scheduling import request
from tests.workers.engine_group import run_on
from workers.engine.adapters.ref import AdapterLimits
from workers.engine.engine import Engine
from workers.engine.request import FinishReason, Request

Shape = tuple[int, int, int, int]  # prompt, output, first token, adapter (-1: none)
SHAPES = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 10), st.integers(0, 3), st.integers(-1, 5)), min_size=1, max_size=10
)
LIMITS = st.tuples(st.integers(1, 3), st.integers(0, 2)).map(lambda n: AdapterLimits(n[0], n[0] + n[1]))


def requests_of(shapes: list[Shape]) -> list[Request]:
    found = []
    for i, (num_prompt, num_output, start, adapter) in enumerate(shapes):
        one = request(f"r{i}", num_prompt, num_output, 3 * start, ignore_eos=True)
        one.adapter = ref(adapter) if adapter >= 0 else None
        found.append(one)
    return found


def alone(shapes: list[Shape]) -> dict[str, list[int]]:
    tokens = {}
    for one in requests_of(shapes):
        tokens |= run_on(make(AdapterLimits(1, 1))[0], [one])[0]
    return tokens


@pytest.mark.parametrize(("is_async", "num_stages"), [(False, 1), (True, 1), (False, 2)])
@settings(max_examples=40, deadline=None)
@given(
    shapes=SHAPES, limits=LIMITS, num_blocks=st.integers(7, 24), failing=st.sets(st.integers(1, 40), max_size=4),
    broken=st.sets(st.integers(0, 5), max_size=2), writes_back=st.booleans(),
)  # fmt: skip
def test_everybody_gets_its_own_adapter(is_async, num_stages, shapes, limits, num_blocks, failing, broken, writes_back):
    expected = alone(shapes)
    engine, runner = make(limits, num_blocks, 8, is_async, num_stages=num_stages, writes_back=writes_back)
    runner.broken = {ref(number).path for number in broken}
    raised: list[bool] = []

    def fails(plan) -> bool:
        if plan.num_requests:
            raised.append(plan.sequence in failing and not all(raised[-2:] or [False]))
        return bool(plan.num_requests) and raised[-1]

    runner.fails = fails
    tokens, ends = run_on(engine, requests_of(shapes))
    engine.scheduler.adapters.check()
    assert runner.most_in_host <= limits.max_loaded
    for i, (_, _, _, adapter) in enumerate(shapes):
        name = f"r{i}"
        if adapter in broken:
            assert (ends[name].reason, ends[name].error) == (FinishReason.ADAPTER_FAILED, "broken")
            assert tokens[name] == []
        elif ends[name].reason is FinishReason.STEP_FAILED:
            assert tokens[name] == expected[name][: len(tokens[name])]
        else:
            assert ends[name].reason is FinishReason.LENGTH
            assert tokens[name] == expected[name]


_ARRIVALS_S = map(float, itertools.count())


def running(engine: Engine) -> set[str]:
    return {request.request_id for request in engine.scheduler.running}


def until(engine: Engine, is_reached) -> None:
    for _ in range(200):
        if is_reached():
            return
        engine.step()
    raise AssertionError("never reached")


def submit(engine: Engine, name: str, adapter: int, num_output: int = 40, arrival_s: float | None = None) -> None:
    one = request(name, 3, num_output, ignore_eos=True)
    one.adapter, one.arrival_time_s = ref(adapter), next(_ARRIVALS_S) if arrival_s is None else arrival_s
    engine.submit(one)


def test_what_is_in_use_is_never_evicted_and_the_least_recently_used_goes_first():
    engine, runner = make(AdapterLimits(2, 2), max_num_seqs=4)
    for number, num_output in ((0, 40), (1, 2)):
        submit(engine, f"r{number}", number, num_output)
    until(engine, lambda: running(engine) == {"r0"})
    submit(engine, "r2", 2)
    until(engine, lambda: running(engine) == {"r0", "r2"})
    assert set(runner.slots.values()) == {b"", ref(0).digest, ref(2).digest}
    assert runner.host == {ref(0).digest, ref(2).digest}


def test_requests_behind_one_without_a_slot_go_on_but_not_into_the_slot_it_waits_for():
    engine, runner = make(AdapterLimits(2, 4), max_num_seqs=8)
    submit(engine, "a1", 0, 12)
    submit(engine, "b1", 1, 30)
    submit(engine, "b2", 1, 30)
    until(engine, lambda: running(engine) == {"a1", "b1", "b2"})
    submit(engine, "c1", 2)  # claims the slot of 0, which has one user
    until(engine, lambda: ref(2).digest in runner.host)
    submit(engine, "a2", 0)
    submit(engine, "b3", 1)
    until(engine, lambda: "b3" in running(engine))
    assert running(engine) == {"a1", "b1", "b2", "b3"}
    assert engine.scheduler.adapters.num_waiting == 2
    until(engine, lambda: "c1" in running(engine))
    assert "a2" not in running(engine)


def test_a_steady_stream_of_one_adapter_starves_nobody():
    engine, _ = make(AdapterLimits(1, 2), max_num_seqs=2)
    submit(engine, "a0", 0, 6)
    until(engine, lambda: running(engine) == {"a0"})
    submit(engine, "other", 1, 4)
    for i in range(1, 60):
        submit(engine, f"a{i}", 0, 6)
        engine.step()
        engine.step()
        if "other" in running(engine):
            break
    assert i < 20


def test_reads_begin_while_requests_wait():
    engine, runner = make(AdapterLimits(1, 3), max_num_seqs=1)
    submit(engine, "r0", 0, 30)
    until(engine, lambda: running(engine) == {"r0"})
    submit(engine, "r1", 1)
    engine.step()
    engine.step()
    assert ref(1).digest in runner.host


def test_a_hanging_read_ends_its_requests_after_the_time_out_and_no_others():
    now = [0.0]
    engine, runner = make(AdapterLimits(2, 2), clock=lambda: now[0])
    runner.hanging = {ref(0).path}
    submit(engine, "hangs", 0, arrival_s=0.0)
    submit(engine, "goes on", 1, 30, arrival_s=0.0)
    until(engine, lambda: running(engine) == {"goes on"})
    assert list(engine.expire()) == []
    now[0] = 59.0
    assert list(engine.expire()) == []
    now[0] = 61.0
    ends = list(engine.expire())
    assert [(end.request_id, end.reason) for end in ends] == [("hangs", FinishReason.ADAPTER_FAILED)]
    assert ends[0].error == "/adapters/0: the adapter was not read within 60 s"
    assert running(engine) == {"goes on"}


def test_a_request_that_comes_during_a_read_has_its_whole_time():
    now = [0.0]
    engine, runner = make(AdapterLimits(2, 2), clock=lambda: now[0])
    runner.hanging = {ref(0).path}
    submit(engine, "first", 0, arrival_s=0.0)
    engine.step()
    assert list(engine.expire()) == []
    now[0] = 50.0
    submit(engine, "second", 0, arrival_s=50.0)
    engine.step()
    now[0] = 70.0
    assert [end.request_id for end in engine.expire()] == ["first"]
    now[0] = 111.0
    assert [end.request_id for end in engine.expire()] == ["second"]


def test_a_read_that_begins_late_has_its_whole_time():
    now = [100.0]
    engine, runner = make(AdapterLimits(2, 2), clock=lambda: now[0])
    runner.hanging = {ref(0).path}
    submit(engine, "queued for long", 0, arrival_s=0.0)
    engine.step()
    assert list(engine.expire()) == []
    now[0] = 161.0
    assert [end.request_id for end in engine.expire()] == ["queued for long"]


def test_pinned_adapters_are_loaded_before_anybody_asks_and_stay():
    engine, runner = make(AdapterLimits(3, 4), max_num_seqs=1)
    engine.pin_adapters("router", [ref(0), ref(1), ref(2), ref(3)])
    until(engine, lambda: len(set(runner.slots.values())) == 3)
    assert set(runner.slots.values()) == {b"", ref(0).digest, ref(1).digest}, "one slot is left for others"
    for number in (4, 5, 4, 5):
        submit(engine, f"r{number}-{engine.counters.num_steps}", number, 2)
        until(engine, lambda: not engine.scheduler.requests)
        assert {ref(0).digest, ref(1).digest} <= set(runner.slots.values())
    engine.pin_adapters("router", [])
    for number in (2, 3, 4):
        submit(engine, f"u{number}", number, 2)
        until(engine, lambda: not engine.scheduler.requests)
    assert set(runner.slots.values()) == {b"", ref(2).digest, ref(3).digest, ref(4).digest}


def test_what_is_pinned_is_not_waited_for():
    """A request without a slot claims one that falls idle, and requests of the pinned adapter go on."""
    engine, runner = make(AdapterLimits(2, 3), max_num_seqs=3)
    engine.pin_adapters("router", [ref(0)])
    submit(engine, "busy0", 1, 6)
    until(engine, lambda: running(engine) == {"busy0"} and ref(0).digest in runner.slots.values())
    submit(engine, "other", 2, 4)
    until(engine, lambda: ref(2).digest in runner.host)
    submit(engine, "pinned", 0, 40)
    until(engine, lambda: "pinned" in running(engine))
    assert "other" not in running(engine)
    for i in range(1, 20):
        submit(engine, f"busy{i}", 1, 6)
        engine.step()
        engine.step()
        if "other" in running(engine):
            break
    assert i < 10


def test_a_read_that_is_waited_for_takes_no_blocks_from_clients_that_do_not_read():
    engine, runner = make(AdapterLimits(2, 2), max_num_seqs=4)
    stalled = request("stalled", 3, 30, ignore_eos=True)
    stalled.adapter, stalled.window_tokens = ref(0), 2
    engine.submit(stalled)
    until(engine, lambda: stalled.is_stalled)
    runner.hanging = {ref(1).path}
    submit(engine, "other", 1, 3)
    for _ in range(5):
        engine.step()
    assert stalled.num_preemptions == 0


def test_a_pinned_adapter_that_fails_is_not_tried_over_and_over():
    engine, runner = make(AdapterLimits(2, 2))
    runner.broken = {ref(0).path}
    engine.pin_adapters("router", [ref(0)])
    for _ in range(20):
        engine.step()
    assert engine.scheduler.adapters.num_reads == engine.scheduler.adapters.num_failed == 1


def test_stalled_clients_do_not_keep_slots_from_others():
    engine, runner = make(AdapterLimits(1, 2), max_num_seqs=4)
    stalled = request("stalled", 3, 30, ignore_eos=True)
    stalled.adapter, stalled.window_tokens = ref(0), 2
    engine.submit(stalled)
    until(engine, lambda: stalled.is_stalled)
    submit(engine, "other", 1, 3)
    until(engine, lambda: "other" not in engine.scheduler.requests)
    engine.credit("stalled", 100)
    until(engine, lambda: not engine.scheduler.requests)

    assert runner.slots[0] == ref(0).digest
