"""Takes a request's blocks away when others need them: to be computed again, or swapped to the tiers and pulled again,
whichever is expected to be faster.

What a request computed goes to the tiers as its blocks fill, so a swap stores only what is missing there. These blocks
are free when the step that copies them is through; all others at once. Pure; knows nothing of who comes next.
"""

from __future__ import annotations

from costs.transfer import TransferCost
from kvstore.blocks.block_pools import BlockPools
from workers.engine.adapters.book import AdapterBook
from workers.engine.kv.stores import Stores
from workers.engine.queues import RequestQueues
from workers.engine.request import Request, RequestRole, RequestStatus
from workers.engine.rows import BatchRows
from workers.engine.step import SchedulerOutput


class Preemption:
    """Of one engine."""

    def __init__(
        self,
        pool: BlockPools,
        rows: BatchRows,
        queues: RequestQueues,
        stores: Stores,
        cost: TransferCost,
        adapters: AdapterBook,
    ) -> None:
        self._pool = pool
        self._rows = rows
        self._queues = queues
        self._stores = stores
        self._cost = cost
        self._adapters = adapters
        self.num_leaving_blocks = 0  # of each group: free when the steps that copy them are through
        self.num_swaps = 0
        self.num_recomputes = 0

    @property
    def num_preemptions(self) -> int:
        """Of either kind."""
        return self.num_swaps + self.num_recomputes

    def preempt(self, plan: SchedulerOutput, request: Request) -> None:
        """The request waits again."""
        assert request.row < 0 or request.row not in plan.rows, f"{request.request_id} is in the plan already"
        plan.has_preempted = True
        if self._swap_out(plan, request):
            self.num_swaps += 1
        else:
            self.num_recomputes += 1
        self._requeue(request)

    def preempt_stalled(self, plan: SchedulerOutput) -> bool:
        """Take the blocks of a client that does not read, for one that waits; False when there is no such client.

        Only while nothing else runs: running requests free their blocks, and most clients are slow for a moment only.
        """
        queues = self._queues
        if plan.requests or queues.num_active or not queues.running or self.num_leaving_blocks:
            return False  # also while blocks of another are being copied: they are free after this step
        self.preempt(plan, queues.running[-1])
        return True

    def recompute(self, request: Request) -> None:
        """The request waits again, with nothing of what it had; nor is it known what the tiers have of it."""
        self.num_recomputes += 1
        self._requeue(request)
        self._forget_tiers(request)

    def forget_swaps(self) -> None:
        """Transfers were given up: what was on its way to the tiers for swapped requests is not known to be there."""
        for request in self._queues.waiting:
            if request.is_leaving:
                self._forget_tiers(request)

    def _forget_tiers(self, request: Request) -> None:
        request.num_stored_blocks = request.num_tier_blocks = request.num_available_blocks = 0
        request.num_pull_tokens, request.is_swapped = request.num_given_tokens, False

    def _requeue(self, request: Request) -> None:
        self._queues.leave(request)
        self.release(request)
        request.window_tokens += request.num_pending_tokens  # what is being chosen is chosen again
        request.num_pending_tokens, request.drafts_in_flight = 0, []
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._queues.waiting.add(request)

    def release(self, request: Request) -> None:
        """Give back all that a request holds."""
        if request.block_tables:
            self._pool.release(request.block_tables)
        self._rows.give_back(request)
        self._adapters.release(request)
        request.block_tables = []
        request.num_computed_tokens = request.num_kv_tokens = 0
        request.num_registered_blocks = request.num_ready_blocks = 0
        request.num_loads_in_flight, request.has_window_blocks = 0, False

    def step_is_through(self, plan: SchedulerOutput) -> None:
        """What it copied is free."""
        self.num_leaving_blocks -= plan.num_leaving_blocks

    def _swap_out(self, plan: SchedulerOutput, request: Request) -> bool:
        """Let a request pull its full blocks when it comes back, if that pays; stores those that no tier has."""
        if request.status is RequestStatus.WAITING_FOR_KV:
            return True  # nothing is computed yet, and what it has came from the tiers
        if request.wants_all_rows:
            return False  # its prompt is computed whole
        size = self._pool.block_size
        num_full = self._stores.num_storable(request)
        num_prompt_blocks = request.num_given_tokens // size if request.role is RequestRole.DECODE else 0
        if num_full > num_prompt_blocks:  # a decode request pulls its prompt in any case
            num_new = max(0, num_full - request.num_tier_blocks)
            pays = self._cost.swap_pays(num_new, num_full - num_prompt_blocks, size)
            if not pays or not self._stores.store_now(plan, request, num_full):
                return False
            plan.num_leaving_blocks += num_new
            self.num_leaving_blocks += num_new
            request.num_pull_tokens = max(request.num_given_tokens, num_full * size)
            request.num_available_blocks = max(request.num_available_blocks, num_full)
            request.max_pulled_blocks = num_full  # whatever did not verify before was computed, and stored again
            request.is_swapped = True
        return num_full > 0
