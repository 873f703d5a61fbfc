"""Whatever comes, under every policy: budgets hold, blocks are owned once, every request comes to an end."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from costs.transfer import ALWAYS_FETCH, NEVER_FETCH
from tests.workers.engine.fake_runner import BLOCK_SIZE, EOS, finish_all, make_engine, make_request
from workers.config import POLICIES, SchedulingOptions
from workers.engine.request import RequestRole


class EngineMachine(RuleBasedStateMachine):
    """Random submits, cancels, continues, credits and lossy pulls, over a pool that is too small, for each policy."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.live: set[str] = set()

    @initialize(
        policy=st.sampled_from(POLICIES), cost=st.sampled_from([ALWAYS_FETCH, NEVER_FETCH, None]),
        tpot_target_s=st.sampled_from([0.0, 1.0]), lengths=st.lists(st.integers(1, 14), max_size=5),
    )  # fmt: skip
    def begin(self, policy, cost, tpot_target_s, lengths):
        options = SchedulingOptions(policy=policy, tpot_target_s=tpot_target_s, min_prefill_tokens=3)
        self.engine, self.runner = make_engine(
            num_blocks=10, max_num_seqs=3, budget=6, context=32, scheduling=options,
            writes_back=cost is not None, transfer_cost=cost or ALWAYS_FETCH,
        )  # fmt: skip
        for start, length in enumerate(lengths):  # together they need more blocks than there are
            self.submit_one(length, 16, RequestRole.MIXED, 5 * start, 1 << 40, start - 2)

    @rule(
        target=names, length=st.integers(1, 20), max_tokens=st.integers(1, 16), role=st.sampled_from(RequestRole),
        start=st.integers(0, 2), window=st.sampled_from([1 << 40, 2]), importance=st.integers(-2, 2),
    )  # fmt: skip
    def submit(self, length, max_tokens, role, start, window, importance):
        return self.submit_one(length, max_tokens, role, start, window, importance)

    def submit_one(self, length, max_tokens, role, start, window, importance) -> str:
        self.count += 1
        request = make_request(f"r{self.count}", length, max_tokens, role, float(self.count), start)
        request.window_tokens = window
        request.priority, request.tenant = importance, bytes([importance + 2])
        request.deadline_s = self.count + 40.0 * importance if importance > 0 else float("inf")
        self.engine.submit(request)
        self.live.add(request.request_id)
        return request.request_id

    @rule(name=names)
    def cancel(self, name):
        end = self.engine.cancel(name)
        assert (end is not None) == (name in self.live)
        self.live.discard(name)

    @rule(name=names, lost=st.booleans())
    def continue_request(self, name, lost):
        request = self.engine.scheduler.requests.get(name)
        if request is not None and request.role is RequestRole.DECODE:
            end = self.engine.continue_request(name, [] if lost or request.is_continued else [7])
            if end is not None:
                self.live.remove(name)

    @rule(name=names, count=st.integers(0, 9))
    def announce(self, name, count):
        request = self.engine.scheduler.requests.get(name)
        if request is not None:
            self.engine.scheduler.kv_available(name, min(count, -(-request.num_given_tokens // BLOCK_SIZE)))

    @rule(limit=st.integers(0, 3), token=st.sampled_from([7, EOS]), holds_back=st.booleans(), count=st.integers(1, 6))
    def step(self, limit, token, holds_back, count):
        self.runner.load_limit, self.runner.next_token, self.runner.holds_back = limit, token, holds_back
        for _ in range(count):
            events = self.engine.step()
            if events is None:
                return
            plan = self.runner.plans[-1]
            assert plan.total_num_scheduled_tokens <= 6
            assert len(plan.requests) <= 3
            assert len(set(plan.rows)) == len(plan.rows)
            assert all(count > 0 for count in plan.num_tokens)
            for end in events.ended:
                self.live.remove(end.request_id)
            self.runner.next_token = 7  # else each step would end all that run

    @invariant()
    def books_are_in_order(self):
        scheduler = self.engine.scheduler
        scheduler.pool.check()
        assert set(scheduler.requests) == self.live
        queued = [*scheduler.waiting, *scheduler.waiting_for_kv, *scheduler.running, *scheduler.queues.storing]
        assert len(queued) == len(set(map(id, queued))) == len(self.live)
        owned = [b for r in queued for table in r.block_tables for b in table.held]
        owned += [b for transfer in self.runner.begun for b in transfer.block_ids if not transfer.is_copied]
        assert scheduler.pool.num_referenced == len(set(owned))
        for pool in scheduler.pool.pools:  # a block that requests share has a reference for each
            assert Counter(owned) == {b: n for b in range(pool.num_blocks) if (n := pool.num_references(b))}
        assert scheduler.preemption.num_leaving_blocks == 0  # their steps are through
        run_order = scheduler.policy.run_order
        assert scheduler.running == sorted(scheduler.running, key=run_order)
        assert scheduler.waiting.num_prompt_tokens == sum(
            r.num_given_tokens for r in scheduler.waiting if r.role is not RequestRole.DECODE
        )

    def teardown(self):
        self.runner.load_limit, self.runner.next_token, self.runner.holds_back = 1 << 30, 7, False
        for name in sorted(self.live):
            request = self.engine.scheduler.requests[name]
            self.engine.credit(name, 1 << 40)
            if request.role is RequestRole.DECODE and self.engine.continue_request(name, []) is not None:
                self.live.remove(name)
        ends = finish_all(self.engine)
        assert set(ends) == self.live
        assert self.engine.scheduler.pool.num_referenced == 0


EngineMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase
