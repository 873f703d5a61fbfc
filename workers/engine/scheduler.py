"""Continuous batching by iteration, as pure decisions.

There is no prefill phase and no decode phase: there are requests whose `num_computed_tokens` catch up with their
tokens under a token budget. Chunked prefill, prefix hits, draft tokens and recompute after preemption are all that one
rule. A request whose blocks are elsewhere - because a prefill worker computes them, or because an earlier turn or an
earlier life of the stream left them in the tiers - first holds blocks that fill from there (WAITING_FOR_KV).

`schedule` returns a plan, and counts as computed what the plan will compute: so the next plan can be made before the
step is through. `update` takes what became of a plan. Knows nothing of tensors, tiers, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from costs.transfer import ALWAYS_FETCH, TransferCost
from kvstore.blocks.block_pools import BlockPools
from workers.config import SchedulingOptions
from workers.engine.adapters.book import AdapterBook
from workers.engine.adapters.ref import NO_ADAPTERS, AdapterLimits
from workers.engine.chunks import chunk_tokens
from workers.engine.drafts import take_drafts
from workers.engine.kv.block_naming import RequestNames
from workers.engine.kv.pulls import Pulls
from workers.engine.kv.stores import Stores
from workers.engine.kv.transfers import Transfers
from workers.engine.outcome import StepOutcomes, UpdateResult
from workers.engine.pipeline import PlanSpread
from workers.engine.policies.budgets import StepBudgets
from workers.engine.policies.choice import make_policy
from workers.engine.policies.prefill_budget import StepBudget
from workers.engine.preemption import Preemption
from workers.engine.queues import RequestQueues
from workers.engine.request import Pooling, Request, RequestRole, RequestStatus
from workers.engine.rows import BatchRows
from workers.engine.step import ModelRunnerOutput, RowState, SchedulerOutput


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of one step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    writes_back: bool = False  # publish what requests other than prefill compute, too
    transfer_cost: TransferCost = ALWAYS_FETCH
    scheduling: SchedulingOptions = field(default_factory=SchedulingOptions)
    num_stages: int = 1  # of the pipeline: plans that are in flight at a time
    adapters: AdapterLimits = NO_ADAPTERS


class Scheduler:
    """Owns the requests of one engine and their blocks."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPools, kv_fingerprint: bytes, eos_token_ids: frozenset[int]
    ) -> None:
        self.config = config
        self.pool = pool
        self.rows = BatchRows(config.max_num_seqs)
        self._spread = PlanSpread(config.num_stages, config.max_num_seqs)
        self.transfers = Transfers(pool)
        self.adapters = AdapterBook(config.adapters, self.transfers)
        self._names = RequestNames(kv_fingerprint, pool.block_size)
        self._eos = eos_token_ids
        self.policy = make_policy(config.scheduling)
        self.queues = queues = RequestQueues(self.policy)
        self.requests, self.waiting, self.waiting_for_kv = queues.requests, queues.waiting, queues.waiting_for_kv
        self.running = queues.running
        self._all_groups = range(pool.num_groups)
        self._pulls = Pulls(pool, self.transfers, self._names)
        self.stores = Stores(pool, self.transfers, self._names, config.writes_back)
        self._outcomes = StepOutcomes(queues, pool, self._names, self.transfers, self._pulls, self.max_context_tokens)
        self.budgets = StepBudgets(config.scheduling, config.max_num_batched_tokens, config.num_stages)
        self.preemption = Preemption(pool, self.rows, queues, self.stores, config.transfer_cost, self.adapters)
        self.num_prefixes_fetched = 0  # of the prefixes that only the tiers had: cheaper to pull
        self.num_prefixes_recomputed = 0  # cheaper to compute again

    # ------------------------------------------------------------------------------------------------------ requests
    @property
    def max_context_tokens(self) -> int:
        """Most tokens of one request: more would not fit into the blocks of a group that keeps all of them."""
        return min(self.config.max_model_len, self.pool.max_blocks * self.pool.block_size)

    def name_blocks(self, request: Request) -> None:
        """Name the full blocks of a request that is not queued yet; from any thread."""
        self._names.extend(request)

    def add(self, request: Request) -> None:
        """Queue a request; its id must be new."""
        assert request.request_id not in self.requests
        s = request.sampling
        self.requests[request.request_id] = request
        request.stop_ids = s.stop_token_ids if s.ignore_eos else s.stop_token_ids | self._eos
        request.max_num_tokens = min(request.num_prompt_tokens + s.max_tokens, self.max_context_tokens)
        if request.role in (RequestRole.PREFILL, RequestRole.EMBED):
            request.max_num_tokens = request.num_given_tokens + 1
        self._names.extend(request)
        if request.adapter is not None:
            self.adapters.want(request.adapter)
        self.waiting.add(request)

    def kv_available(self, request_id: str, num_blocks: int) -> None:
        """The first `num_blocks` blocks of a request's prompt are announced; answers a look-up, if there is one."""
        request = self.requests.get(request_id)
        if request is None:
            return
        request.awaits_lookup = False
        if request.role is RequestRole.DECODE or request.status is not RequestStatus.WAITING_FOR_KV:
            request.num_available_blocks = max(request.num_available_blocks, num_blocks)
        # else it holds blocks for what it was admitted with, and computes the rest

    def wants_lookup(self, request: Request) -> bool:
        """Whether the tiers may have a part of a new request's prompt that this device has not.

        Decode requests are watched over as long as they wait; see pending_pulls.
        """
        if request.wants_all_rows:
            return False
        num_hit = self.pool.num_matched(request.block_names)
        return request.role is not RequestRole.DECODE and num_hit < len(request.block_names)

    def continue_request(self, request_id: str, token_ids: list[int]) -> None:
        """The prefill side is through: what can be pulled is there, and these tokens were chosen there."""
        request = self.requests.get(request_id)
        if request is not None and not request.is_continued:
            request.is_continued = True
            request.token_ids.extend(token_ids)
            self._names.extend(request)

    def propose(self, request_id: str, draft_token_ids: list[int]) -> None:
        """Tokens that may follow: each is kept if it is what the model chooses there (speculation by equality)."""
        request = self.requests.get(request_id)
        if request is not None:
            request.draft_token_ids = draft_token_ids

    def finish(self, request: Request) -> None:
        """Take a request out; its blocks are only cache from then on."""
        self.queues.leave(request)
        self.preemption.release(request)
        request.status = RequestStatus.FINISHED
        del self.requests[request.request_id]

    def has_work(self) -> bool:
        """A step might do something, now or when blocks have come or gone."""
        return bool(self.waiting or self.running or self.waiting_for_kv or self.queues.storing or self.transfers)

    def pending_pulls(self) -> Iterator[tuple[str, list[bytes]]]:
        """Requests that wait for blocks, and the names that they still lack, for the watch of the directory."""
        return self._pulls.pending(self.waiting_for_kv)

    def queued_pulls(self, max_requests: int, known: Collection[str]) -> Iterator[tuple[str, list[bytes]]]:
        """Of the first queued requests those whose pulls are certain, but for the known ones.

        With the names of the blocks; none when the device has them all or computing them is cheaper.
        """
        first = (r for r in islice(self.waiting.in_order(), max_requests) if r.request_id not in known)
        return self._pulls.certain(first, self.config.transfer_cost)

    @property
    def num_preemptions(self) -> int:
        """Requests that lost their blocks, each time."""
        return self.preemption.num_preemptions

    @property
    def num_recomputed_prompt_tokens(self) -> int:
        """Prompt tokens that decode requests computed though a prefill worker had."""
        return self._outcomes.num_recomputed_prompt_tokens

    # ------------------------------------------------------------------------------------------------------ schedule
    def schedule(self) -> SchedulerOutput:
        """Decide the next step."""
        plan = SchedulerOutput()
        self.adapters.begin()
        for request in self._pulls.ready(self.waiting_for_kv):
            self._start_with_what_came(request)
        self._spread.begin(self.running, len(self.waiting))
        budget = self.budgets.next(self.running, self._spread)
        self._schedule_running(plan, budget)
        if self.waiting and len(plan.requests) < self._spread.max_requests:
            self._admit_waiting(plan, budget)
        plan.loads += self._pulls.start(self.waiting_for_kv)
        if not (plan.requests or self.transfers) and self._pulls.is_stuck(self.waiting_for_kv):
            self.preemption.preempt(plan, self.queues.victim())  # they hold what the others wait for
        if plan.requests:
            self._spread.end()
        plan.adapter_orders += self.adapters.take_orders()
        return plan

    def _admit_waiting(self, plan: SchedulerOutput, budget: StepBudget) -> None:
        """In the policy's order, up to the first that does not fit."""
        num_active = self.queues.num_active
        for request in self.waiting.in_order():
            if request.is_stalled or request.awaits_lookup:
                continue
            if request.is_leaving and num_active:
                continue  # with nothing else to do it is not waited for: a tier may hang
            is_full = len(plan.requests) >= self._spread.max_requests  # the next plan takes it
            if is_full or plan.has_preempted or plan.awaits_blocks or num_active >= self.config.max_num_seqs:
                break
            most = budget.num_chunk_tokens  # it gets blocks for them, and takes none of what is planned already
            if most <= 0 and request.role is not RequestRole.DECODE:
                break
            if request.adapter is not None and not self.adapters.acquire(request):
                if self.adapters.lacks_slot(request.adapter):
                    self.preemption.preempt_stalled(plan)
                continue  # requests with other adapters need not wait
            while not (is_admitted := self._admit(request, most)) and self.preemption.preempt_stalled(plan):
                pass
            if not is_admitted:
                self.adapters.release(request)
                break
            num_active += 1
            if request.status is RequestStatus.RUNNING and most > 0:
                left = self._num_left(request)
                budget.spend(self._plan_chunk(plan, request, left, most, budget.num_tokens), is_chunk=left > 1)

    def _schedule_running(self, plan: SchedulerOutput, budget: StepBudget) -> None:
        """Chunks of requests that run already, in the policy's order.

        Hundreds of requests come by here in each step, most of them for one token that fits into their last block.
        """
        spread, scheduled, num_tokens = self._spread, plan.requests, budget.num_tokens
        for request in tuple(self.running):  # victims are the last, so none of them is planned already
            left = len(request.token_ids) + request.num_pending_tokens - request.num_computed_tokens
            if left <= 0 or request.window_tokens <= 0:
                continue  # nothing to compute until its drafts are judged, or a client that does not read
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted by an earlier one in this loop
            if request.num_pending_tokens and (request.row < 0 or request.draft_token_ids or request.awaits_drafts):
                continue  # only the ranks will know its token before the step is through, and drafts follow known ones
            if spread.awaits_turn(request):
                continue
            if num_tokens <= 0 or len(scheduled) == spread.max_running:
                break  # with one stage more than that when stalled ones come back to life
            if left == 1:
                num_tokens -= self._plan_chunk(plan, request, 1, num_tokens, num_tokens)
            elif (most := min(num_tokens, budget.num_prefill_tokens)) > 0:
                count = self._plan_chunk(plan, request, left, most, num_tokens)
                num_tokens -= count
                budget.num_prefill_tokens -= count
        budget.num_tokens = num_tokens

    def _num_left(self, request: Request) -> int:
        return len(request.token_ids) + request.num_pending_tokens - request.num_computed_tokens

    def _plan_chunk(self, plan: SchedulerOutput, request: Request, left: int, most: int, budget: int) -> int:
        """Compute at most so many next tokens of a request, with drafts as many as the budget; returns how many.

        0: it is over with the token that is being chosen, or it was preempted to free blocks.
        """
        start, known, num_pending = request.num_computed_tokens, request.token_ids, request.num_pending_tokens
        if len(known) + num_pending >= request.max_num_tokens:
            return 0
        count = left if left == 1 else chunk_tokens(request, start, most, self.pool.block_size)
        end, is_last = start + count, count == left
        drafts = take_drafts(request, end, budget - count, self.pool) if is_last and request.draft_token_ids else ()
        end += len(drafts)
        size = self.pool.block_size
        num_slots = self.pool.num_entries(request.block_tables) * size
        if end > num_slots and not self._free_blocks_for(plan, request, end):
            return 0
        if self.rows.take(request, plan.rows):
            plan.new_rows.append(RowState.of(request))
        num_known = count - num_pending if is_last else count
        if num_known == 1:
            plan.token_ids.append(known[start])
        else:
            plan.token_ids += known[start : start + num_known]
        plan.token_ids += drafts
        is_scored = request.sampling.prompt_logprobs is not None and request.wants_prompt_logprobs
        targets = known[start + 1 : start + count + 1] if is_scored else ()
        num_logits = count if request.pooling is Pooling.MEAN else len(targets) + is_last + len(drafts)
        plan.append(request, start, end - start, num_known + len(drafts), num_logits, targets)
        request.num_computed_tokens = end
        if end > request.num_kv_tokens:
            request.num_kv_tokens = end
        if is_last:
            request.num_pending_tokens = num_pending + 1
            self._spread.note(request)
            request.window_tokens -= 1
        if end // size > request.num_stored_blocks or (is_last and request.role is RequestRole.PREFILL):
            self.stores.plan(plan, request, end, is_last)
        return end - start

    def _admit(self, request: Request, budget: int) -> bool:
        """Give a waiting request its first blocks; False when there are too few."""
        pool, size = self.pool, self.pool.block_size
        num_hit = num_elsewhere = 0
        if not request.wants_all_rows:
            num_hit = pool.num_matched(request.block_names[: request.num_tokens // size])
            if request.is_leaving:  # from a tier that does not take blocks nothing is pulled either
                request.max_pulled_blocks = num_hit
            num_elsewhere = self._pulls.num_awaited(request) - num_hit
        request.num_ready_blocks = num_hit
        fetches = num_elsewhere > 0 and self.config.transfer_cost.fetch_pays(num_elsewhere, size)
        waits_for_kv = not self._pulls.is_ready(request) if request.role is RequestRole.DECODE else fetches
        computed = min(num_hit * size, request.num_tokens - 1)
        tables = pool.take_prefix(request.block_names[:num_hit])
        if waits_for_kv:
            groups: Sequence[int] = self._pulls.whole_groups
            num_blocks = -(-min(request.num_pull_tokens, self._pulls.num_awaited(request) * size) // size)
        else:
            groups = self._all_groups
            chunk = chunk_tokens(request, computed, budget, size)
            num_blocks = -(-(computed + chunk) // size)
        if not pool.can_extend(tables, num_blocks, groups):
            pool.release(tables)
            return False
        pool.extend(tables, num_blocks, groups)
        request.block_tables = tables
        request.num_registered_blocks = num_hit
        request.num_kv_tokens = num_hit * size
        request.has_window_blocks = num_elsewhere <= 0
        if request.role is not RequestRole.DECODE and num_elsewhere > 0:
            self.num_prefixes_fetched += fetches
            self.num_prefixes_recomputed += not fetches
        self.waiting.remove(request)
        self.policy.admitted(request)
        request.was_admitted, request.is_swapped = True, False
        if waits_for_kv:
            request.status = RequestStatus.WAITING_FOR_KV
            self.waiting_for_kv.append(request)
        else:
            self._start_running(request, computed)
        return True

    def _start_running(self, request: Request, num_computed_tokens: int) -> None:
        request.num_computed_tokens = num_computed_tokens
        if request.num_preemptions == 0 and request.role is not RequestRole.DECODE:
            request.num_cached_prompt_tokens = min(num_computed_tokens, request.num_prompt_tokens)
        num_full = request.num_kv_tokens // self.pool.block_size
        request.num_tier_blocks = max(request.num_tier_blocks, num_full)
        if request.role is not RequestRole.PREFILL:  # which publishes its prefix hits too: a tier may have lost them
            request.num_stored_blocks = max(request.num_stored_blocks, num_full)
        request.status = RequestStatus.RUNNING
        self.queues.run(request)

    def _start_with_what_came(self, request: Request) -> None:
        """Nothing more will come: compute the rest."""
        self.waiting_for_kv.remove(request)
        if self.pool.has_windows and not request.has_window_blocks and request.num_kv_tokens:
            self.preemption.release(request)  # without what the windows see, nothing can go on from what came
            request.max_pulled_blocks = 0
            request.status = RequestStatus.WAITING
            self.waiting.add(request)
            return
        self._start_running(request, min(request.num_kv_tokens, request.num_tokens - 1))

    def _free_blocks_for(self, plan: SchedulerOutput, request: Request, num_tokens: int) -> bool:
        """Blocks for `num_tokens` tokens of a running request, preempting the last; False when it went itself or waits.

        It waits for blocks that are being copied, and for a pull of a later request, which can be preempted then.
        Otherwise two requests could give way to each other's pulls for ever.
        """
        num_blocks = -(-num_tokens // self.pool.block_size)
        while (missing := self.pool.num_missing(request.block_tables, num_blocks, self._all_groups)) > 0:
            victim = self.queues.victim()
            has_later_pull = victim is request and self.queues.has_later_pull(request)
            if missing <= self.preemption.num_leaving_blocks or has_later_pull:
                plan.awaits_blocks = True
                return False
            self.preemption.preempt(plan, victim)
            if victim is request:
                return False
        before = [len(table.block_ids) for table in request.block_tables]
        self.pool.extend(request.block_tables, num_blocks, self._all_groups)
        if request.row >= 0:
            for group, (table, first) in enumerate(zip(request.block_tables, before, strict=True)):
                for index in range(first, len(table.block_ids)):
                    plan.new_blocks += (group, request.row, index, table.block_ids[index])
        return True

    def update(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> UpdateResult:
        """Take a step's outcome into the books."""
        others, failed = self.adapters.end_reads(output, self.waiting)
        result = self._outcomes.update(plan, others)
        result.finished += failed
        self.preemption.step_is_through(plan)
        self.policy.served(result.tokens.requests)
        return result

    def abandon(self, failed: SchedulerOutput, later: Sequence[SchedulerOutput]) -> UpdateResult:
        """A step raised, and its requests are gone. Those of the steps behind it compute again from known tokens."""
        self.preemption.forget_swaps()
        for plan in (failed, *later):
            self.preemption.step_is_through(plan)
            for request in plan.running_requests():
                self.preemption.recompute(request)
        self.rows.resend()
        self.adapters.start_anew()
        return self._outcomes.abandon([failed, *later])
