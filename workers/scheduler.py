"""Continuous batching by iteration, as pure decisions.

There is no prefill phase and no decode phase: there are requests whose `num_computed_tokens` catch up with their
tokens under a token budget. Chunked prefill, prefix hits and recompute after preemption are all that one rule. A
request whose blocks are elsewhere - because a prefill worker computes them, or because an earlier turn or an earlier
life of the stream left them in the tiers - first holds blocks that fill from there (WAITING_FOR_KV).

`schedule` returns a plan, `update` takes what became of it. Knows nothing of tensors, tiers, sockets or clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from costs.transfer import ALWAYS_FETCH, TransferCost
from kvstore.block_pool import BlockPool
from kvstore.names import block_name, block_names, root_name
from workers.request import FinishReason, Request, RequestRole, RequestStatus, TokenOutput
from workers.step import NO_TOKEN, BlockTransfer, ModelRunnerOutput, SampleSpec, ScheduledRequest, SchedulerOutput

MAX_LOAD_BLOCKS_PER_STEP = 64  # bounds how long a pull may hold up the running batch
# A prefill request ends with a chunk of this size when its prompt is many times as long: what its decode worker still
# has to pull after the last chunk is then a few blocks, and all else has travelled while the prompt was computed.
LAST_CHUNK_TOKENS = 64
MIN_CHUNKS_FOR_A_SHORT_LAST_ONE = 16


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of one step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    writes_back: bool = False  # publish what requests other than prefill compute, too
    transfer_cost: TransferCost = ALWAYS_FETCH


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What a finished step means for requests."""

    tokens: list[TokenOutput]
    finished: list[tuple[Request, FinishReason]]
    published_names: list[bytes]


def _order(request: Request) -> tuple[float, str]:
    return request.arrival_time_s, request.request_id


class Scheduler:
    """Owns the requests of one engine and their blocks."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, kv_fingerprint: bytes, eos_token_ids: frozenset[int]
    ) -> None:
        self.config = config
        self.pool = pool
        self._fingerprint = kv_fingerprint
        self._eos = eos_token_ids
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.waiting_for_kv: list[Request] = []
        self.running: list[Request] = []
        self.num_recomputed_prompt_tokens = 0
        self.num_preemptions = 0
        self.num_prefixes_fetched = 0  # of the prefixes that only the tiers had: cheaper to pull
        self.num_prefixes_recomputed = 0  # cheaper to compute again

    # ------------------------------------------------------------------------------------------------------ requests
    def add(self, request: Request) -> None:
        """Queue a request; its id must be new."""
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        self._extend_names(request)
        self.waiting.append(request)

    def kv_available(self, request_id: str, num_blocks: int) -> None:
        """The first `num_blocks` blocks of a request's prompt are announced; answers a look-up, if there is one."""
        request = self.requests.get(request_id)
        if request is None:
            return
        request.awaits_lookup = False
        if request.role is RequestRole.DECODE or request.status is not RequestStatus.WAITING_FOR_KV:
            request.num_available_blocks = max(request.num_available_blocks, num_blocks)
        # else it holds room for what it was admitted with, and computes the rest

    def wants_lookup(self, request: Request) -> bool:
        """Whether the tiers may have a part of a new request's prompt that this device has not.

        Decode requests are watched over as long as they wait; see pending_pulls.
        """
        hit = self.pool.match_prefix(request.block_names)
        return request.role is not RequestRole.DECODE and len(hit) < len(request.block_names)

    def continue_request(self, request_id: str, token_ids: list[int]) -> None:
        """The prefill side is through: what can be pulled is there, and these tokens were chosen there."""
        request = self.requests.get(request_id)
        if request is not None and not request.is_continued:
            request.is_continued = True
            request.token_ids.extend(token_ids)
            self._extend_names(request)

    def finish(self, request: Request) -> None:
        """Take a request out; its blocks are only cache from then on."""
        self._remove_from_queues(request)
        self._release_blocks(request)
        request.status = RequestStatus.FINISHED
        del self.requests[request.request_id]

    def has_work(self) -> bool:
        """A step might do something."""
        return bool(self.waiting or self.running or self.waiting_for_kv)

    def pending_pulls(self) -> Iterator[tuple[str, list[bytes]]]:
        """Requests that wait for blocks, and the names that they still lack, for whoever watches the directory."""
        for request in self.waiting_for_kv:
            if not request.is_announced:
                yield request.request_id, self._prompt_names(request)[request.num_ready_blocks :]

    def queued_pulls(self, max_requests: int, known: Collection[str]) -> Iterator[tuple[str, list[bytes]]]:
        """Of the first queued requests those whose pulls are certain, but for the known ones.

        With the names of the blocks; none when the device has them all or computing them is cheaper.
        """
        for request in islice(self.waiting, max_requests):
            if request.request_id in known or request.awaits_lookup or not request.is_announced:
                continue
            is_decode = request.role is RequestRole.DECODE
            all_names = self._prompt_names(request) if is_decode else request.block_names
            names = all_names[: self._num_awaited_blocks(request)]
            names = names[len(self.pool.match_prefix(names)) :]
            pays = is_decode or self.config.transfer_cost.fetch_pays(len(names), self.pool.block_size)
            yield request.request_id, names if pays else []

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed (decode requests bring theirs)."""
        return sum(
            max(0, r.num_given_tokens - r.num_computed_tokens)
            for r in (*self.waiting, *self.running)
            if r.role is not RequestRole.DECODE
        )

    # ------------------------------------------------------------------------------------------------------ schedule
    def schedule(self) -> SchedulerOutput:
        """Decide the next step."""
        budget = self.config.max_num_batched_tokens
        preempted: list[str] = []
        scheduled: list[ScheduledRequest] = []
        stores: list[BlockTransfer] = []
        write_backs: list[BlockTransfer] = []
        self._start_what_is_ready()
        for request in sorted(self.running, key=_order):  # victims are the latest, so none of them is planned already
            if request.status is not RequestStatus.RUNNING or request.is_stalled:
                continue  # preempted by an earlier one in this loop, or its client is slow
            if len(scheduled) == self.config.max_num_seqs:
                break  # more than that when stalled ones come back to life
            count = self._chunk_tokens(request, request.num_computed_tokens, budget)
            if count > 0 and self._make_room(request, request.num_computed_tokens + count, preempted):
                budget -= count
                self._plan_chunk(request, count, scheduled, stores, write_backs)
        for request in [r for r in self.waiting if not (r.is_stalled or r.awaits_lookup)]:
            if preempted or self._num_active() >= self.config.max_num_seqs:
                break
            if (budget <= 0 and request.role is not RequestRole.DECODE) or not self._admit(request, budget):
                break
            self.waiting.remove(request)
            count = self._chunk_tokens(request, request.num_computed_tokens, budget)
            if request.status is RequestStatus.RUNNING and count > 0:
                budget -= count
                self._plan_chunk(request, count, scheduled, stores, write_backs)
        return SchedulerOutput(scheduled, self._schedule_loads(), stores, write_backs, preempted)

    def _chunk_tokens(self, request: Request, num_computed_tokens: int, budget: int) -> int:
        """How many tokens of a request to compute next."""
        left = request.num_tokens - num_computed_tokens
        count = min(left, budget)
        hands_off = request.role is RequestRole.PREFILL
        if hands_off and request.num_tokens >= MIN_CHUNKS_FOR_A_SHORT_LAST_ONE * LAST_CHUNK_TOKENS:
            # On a block's border, so that everything before the last chunk is published before it.
            before_last = (request.num_tokens - LAST_CHUNK_TOKENS) // self.pool.block_size * self.pool.block_size
            if num_computed_tokens < before_last:
                count = min(count, before_last - num_computed_tokens)
        return count

    def _num_active(self) -> int:
        """Requests that take part in the batch, or will; those whose client does not read stop nobody else."""
        return sum(not r.is_stalled for r in (*self.running, *self.waiting_for_kv))

    def _admit(self, request: Request, budget: int) -> bool:
        """Give a waiting request its first blocks; False when there are too few."""
        pool, size = self.pool, self.pool.block_size
        hit = pool.match_prefix(request.block_names[: request.num_tokens // size])
        request.num_ready_blocks = len(hit)
        num_elsewhere = self._num_awaited_blocks(request) - len(hit)
        fetches = num_elsewhere > 0 and self.config.transfer_cost.fetch_pays(num_elsewhere, size)
        waits_for_kv = not self._is_ready(request) if request.role is RequestRole.DECODE else fetches
        hit_tokens = len(hit) * size
        computed = min(hit_tokens, request.num_tokens - 1)
        target = computed + self._chunk_tokens(request, computed, budget)
        if waits_for_kv:
            target = min(request.num_given_tokens, self._num_awaited_blocks(request) * size)
        needed = max(0, -(-target // size) - len(hit))
        pool.acquire(hit)
        if not pool.can_allocate(needed):
            pool.release(hit)
            return False
        request.block_table = [*hit, *pool.allocate(needed)]
        request.num_registered_blocks = len(hit)
        request.num_kv_tokens = hit_tokens
        if request.role is not RequestRole.DECODE and num_elsewhere > 0:
            self.num_prefixes_fetched += fetches
            self.num_prefixes_recomputed += not fetches
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
        if request.role is not RequestRole.PREFILL:  # which publishes its prefix hits too: a tier may have lost them
            request.num_stored_blocks = max(request.num_stored_blocks, request.num_kv_tokens // self.pool.block_size)
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def _make_room(self, request: Request, num_tokens: int, preempted: list[str]) -> bool:
        """Blocks for `num_tokens` tokens of a running request, preempting the latest; False when it went itself."""
        needed = -(-num_tokens // self.pool.block_size) - len(request.block_table)
        while needed > 0 and not self.pool.can_allocate(needed):
            victim = max((*self.running, *self.waiting_for_kv), key=lambda r: (r.is_stalled, *_order(r)))
            self._preempt(victim)
            preempted.append(victim.request_id)
            if victim is request:
                return False
        if needed > 0:
            request.block_table.extend(self.pool.allocate(needed))
        return True

    def _preempt(self, request: Request) -> None:
        self._remove_from_queues(request)
        self._release_blocks(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _plan_chunk(
        self,
        request: Request,
        count: int,
        scheduled: list[ScheduledRequest],
        stores: list[BlockTransfer],
        write_backs: list[BlockTransfer],
    ) -> None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + count
        s = request.sampling
        is_last = end == request.num_tokens
        sample = SampleSpec(s.temperature, s.top_p, s.top_k, s.seed, request.num_output_tokens) if is_last else None
        scheduled.append(
            ScheduledRequest(
                request.request_id,
                request.token_ids[start:end],
                start,
                request.num_kv_tokens,
                request.block_table[: -(-end // self.pool.block_size)],
                sample,
            )
        )
        first, last = request.num_stored_blocks, end // self.pool.block_size
        if request.role is RequestRole.PREFILL:
            names = self._prompt_names(request)
            last = len(names) if is_last else last
            if last > first:
                stores.append(self._transfer(request, names, first, last, request.num_given_tokens))
        elif self.config.writes_back and (last := min(last, len(request.block_names))) > first:
            # A block has no name while a token in it is still being chosen: then it goes with a later step.
            write_backs.append(self._transfer(request, request.block_names, first, last, end))
            request.num_stored_blocks = last

    # ------------------------------------------------------------------------------------------- blocks from elsewhere
    def _num_awaited_blocks(self, request: Request) -> int:
        """How many blocks, from the first on, are or will be in the tiers."""
        if request.role is RequestRole.DECODE:
            return len(self._prompt_names(request))
        return min(request.num_available_blocks, request.num_given_tokens // self.pool.block_size)

    def _is_ready(self, request: Request) -> bool:
        """Nothing more will be announced, and what was is in the block table."""
        return request.is_announced and request.num_ready_blocks >= self._num_awaited_blocks(request)

    def _start_what_is_ready(self) -> None:
        for request in [r for r in self.waiting_for_kv if self._is_ready(r)]:
            self._start_with_what_came(request)

    def _start_with_what_came(self, request: Request) -> None:
        """Nothing more will come: compute the rest."""
        self.waiting_for_kv.remove(request)
        self._start_running(request, min(request.num_kv_tokens, request.num_tokens - 1))

    def _schedule_loads(self) -> list[BlockTransfer]:
        """Pull what is announced; when nothing more will be, try whatever is missing once, then run with what came."""
        loads, room = [], MAX_LOAD_BLOCKS_PER_STEP
        for request in self.waiting_for_kv:
            names = self._prompt_names(request)
            wanted = self._num_awaited_blocks(request) if request.is_announced else request.num_available_blocks
            first, last = request.num_ready_blocks, min(len(names), wanted, request.num_ready_blocks + room)
            if last > first:
                loads.append(self._transfer(request, names, first, last, request.num_given_tokens))
                room -= last - first
        return loads

    def _update_loads(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        for load, count in zip(plan.loads, output.num_loaded_blocks, strict=True):
            request = self.requests.get(load.request_id)
            if request is None or request.status is not RequestStatus.WAITING_FOR_KV:
                continue
            request.num_ready_blocks += count
            request.num_transferred_blocks += count
            request.num_kv_tokens = max(
                request.num_kv_tokens, min(request.num_ready_blocks * self.pool.block_size, request.num_given_tokens)
            )
            self._register_blocks(request)
            if count == len(load.block_ids):
                continue
            if request.is_announced:
                self._start_with_what_came(request)
            else:
                request.num_available_blocks = request.num_ready_blocks  # announced and gone: ask again

    # -------------------------------------------------------------------------------------------------------- update
    def update(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> UpdateResult:
        """Take a step's outcome into the books."""
        result = UpdateResult([], [], [])
        self._update_loads(plan, output)
        for store, count in zip(plan.stores, output.num_stored_blocks, strict=True):
            result.published_names.extend(store.block_names[:count])
            request = self.requests.get(store.request_id)
            if request is not None:
                request.num_published_blocks += count
                request.num_stored_blocks += len(store.block_names)
        sampled = iter(output.sampled_token_ids)
        for chunk in plan.requests:
            token_id = next(sampled) if chunk.sample is not None else None
            request = self.requests.get(chunk.request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue
            self._count_computed(request, chunk)
            request.num_computed_tokens += chunk.num_scheduled_tokens
            request.num_kv_tokens = max(request.num_kv_tokens, request.num_computed_tokens)
            self._register_blocks(request)
            if token_id is not None:
                self._append_token(request, token_id, result)
        return result

    def _append_token(self, request: Request, token_id: int, result: UpdateResult) -> None:
        s = request.sampling
        if token_id == NO_TOKEN:
            result.finished.append((request, FinishReason.FAILED))
            return
        if token_id in s.stop_token_ids or (token_id in self._eos and not s.ignore_eos):
            result.finished.append((request, FinishReason.STOP))
            return
        result.tokens.append(TokenOutput(request.request_id, request.epoch, request.num_output_tokens, token_id))
        request.token_ids.append(token_id)
        request.window_tokens -= 1
        self._extend_names(request)
        if request.num_output_tokens >= s.max_tokens or request.num_tokens >= self.config.max_model_len:
            result.finished.append((request, FinishReason.LENGTH))
        elif request.role is RequestRole.PREFILL:
            result.finished.append((request, FinishReason.PREFILLED))

    def _count_computed(self, request: Request, chunk: ScheduledRequest) -> None:
        prompt_tokens = max(
            0, min(chunk.start_position + chunk.num_scheduled_tokens, request.num_given_tokens) - chunk.start_position
        )
        request.num_computed_prompt_tokens += prompt_tokens
        if request.role is RequestRole.DECODE:
            self.num_recomputed_prompt_tokens += prompt_tokens

    # --------------------------------------------------------------------------------------------------------- blocks
    def _extend_names(self, request: Request) -> None:
        """Names of the blocks that are full now; all new ones in one pass, since a prompt may have thousands."""
        size, names = self.pool.block_size, request.block_names
        if request.num_tokens < (len(names) + 1) * size:
            return
        parent = names[-1] if names else root_name(self._fingerprint, request.tenant_salt)
        names += block_names(parent, request.token_ids[len(names) * size :], size, with_tail=False)

    def _prompt_names(self, request: Request) -> list[bytes]:
        """Names of the blocks that prefill publishes: full ones, and the tail named by exactly its tokens."""
        size = self.pool.block_size
        full, rest = divmod(request.num_given_tokens, size)
        names = request.block_names[:full]
        if rest:
            parent = names[-1] if names else root_name(self._fingerprint, request.tenant_salt)
            names.append(block_name(parent, request.token_ids[full * size : request.num_given_tokens]))
        return names

    def _transfer(
        self, request: Request, names: list[bytes], first: int, last: int, num_named_tokens: int
    ) -> BlockTransfer:
        """Blocks first .. last - 1; the last of `names` may be a short one, which ends with num_named_tokens."""
        size = self.pool.block_size
        return BlockTransfer(
            request.request_id,
            names[first:last],
            request.block_table[first:last],
            [min(size, num_named_tokens - i * size) for i in range(first, last)],
        )

    def _register_blocks(self, request: Request) -> None:
        """Name the blocks that are full now, so that other requests find them."""
        full = request.num_kv_tokens // self.pool.block_size
        for i in range(request.num_registered_blocks, min(full, len(request.block_names))):
            self.pool.register(request.block_table[i], request.block_names[i])
            request.num_registered_blocks = i + 1

    def _release_blocks(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = request.num_kv_tokens = 0
        request.num_registered_blocks = request.num_ready_blocks = 0

    def _remove_from_queues(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting_for_kv:
            self.waiting_for_kv.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
