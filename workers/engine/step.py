"""One engine step as data: what the scheduler decides, what a rank is sent of it, and what a rank reports.

A plan has columns, one entry per scheduled request, because a step may have hundreds of requests. It names each request
by its row: the ranks keep the block table and the sampling parameters of every row (workers.runtime.rank_state), and a
plan brings only what changed. Knows nothing of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from costs.step_time import StepWork
from workers.engine.adapters.ref import AdapterOrder
from workers.engine.request import Request, RequestStatus
from workers.sampling.params import RowReport, SamplingParams

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class BlockTransfer:
    """Blocks of one cache group to pull from the tiers, or to publish to them."""

    transfer_id: int
    group: int
    block_names: Sequence[bytes]
    block_ids: Sequence[int]
    num_tokens: Sequence[int]  # filled slots of each block
    is_copied: bool = False  # a store whose blocks may be reused when the step is through; nothing waits for it


@dataclass(frozen=True, slots=True)
class TransferDone:
    """The end of a transfer on every rank."""

    transfer_id: int
    num_blocks: int  # whole and verified, or stored, on every rank; counted from the first. Of an adapter: 1, or 0
    error: str = ""  # why an adapter was not read, on the first rank that could not
    is_unfit: bool = False  # no worker of this model can serve that adapter


@dataclass(frozen=True, slots=True)
class RowState:
    """All that a rank knows of a row: sent when a request takes the row, and again to a rank that lost it."""

    row: int
    num_prompt_tokens: int  # the token at this position of the request is the first of its completion
    sampling: SamplingParams  # ranks get what the sampler needs of it
    block_tables: Sequence[Sequence[int]]  # per cache group
    history: Sequence[int] = ()  # the tokens known so far, where sampling.needs_history
    stop_ids: Sequence[int] = ()  # end the request, where min_tokens holds them off or a grammar lets them in
    pools: bool = False  # hidden states are wanted of it, and no tokens
    adapter_slot: int = -1  # of what is added to the model's weights for it; -1: nothing

    @staticmethod
    def of(request: Request) -> RowState:
        """The state of a request of which no token is being chosen."""
        sampling, block_ids = request.sampling, [table.block_ids for table in request.block_tables]
        pools, slot = request.pooling is not None, request.adapter_slot
        if not sampling.has_rules or pools:
            return RowState(request.row, request.num_prompt_tokens, sampling, block_ids, pools=pools, adapter_slot=slot)
        history = tuple(request.token_ids) if sampling.needs_history else ()
        needs_stop_ids = sampling.min_tokens or sampling.grammar is not None
        stop_ids = tuple(request.stop_ids) if needs_stop_ids else ()
        return RowState(
            request.row, request.num_prompt_tokens, sampling, block_ids, history, stop_ids, adapter_slot=slot
        )


class Chunk(NamedTuple):
    """One scheduled request of a plan: tokens to compute."""

    request: Request
    row: int
    start_position: int
    num_scheduled_tokens: int
    write_from: int
    num_logits: int
    token_ids: Sequence[int]


@dataclass(slots=True)
class SchedulerOutput:
    """The plan of one step. Only the scheduler fills it.

    loads and stores begin with this step and go on beside later ones; loads are of blocks that no scheduled request
    reads, stores of blocks that this step or an earlier one computed.
    """

    requests: list[Request] = field(default_factory=list)  # stay with the leader, as do generations
    generations: list[int] = field(default_factory=list)  # the request's num_preemptions when it was scheduled
    rows: list[int] = field(default_factory=list)
    start_positions: list[int] = field(default_factory=list)  # of the first scheduled token
    num_tokens: list[int] = field(default_factory=list)  # to compute
    write_from: list[int] = field(default_factory=list)  # positions below it are in the cache and are not written
    num_logits: list[int] = field(default_factory=list)  # of the last scheduled tokens: those whose logits are wanted
    # Of these the first ones, which tell of the prompt's next tokens and choose none.
    num_prompt_logits: list[int] = field(default_factory=list)
    prompt_targets: list[int] = field(default_factory=list)  # those tokens, of all requests
    num_known: list[int] = field(default_factory=list)  # one less than num_tokens: the last is still being chosen
    token_ids: list[int] = field(default_factory=list)  # the known ones of all requests
    new_rows: list[RowState] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)  # group, row, index, block id; and so on
    loads: list[BlockTransfer] = field(default_factory=list)
    stores: list[BlockTransfer] = field(default_factory=list)
    ends_prompts: bool = False  # tokens are sent when stores of this step have ended
    num_leaving_blocks: int = 0  # of preempted requests, in each group: held until this step has copied them
    has_preempted: bool = False  # requests lost their blocks, and may come back in the next plan
    awaits_blocks: bool = False  # a running request waits for those of others: nobody new may take them
    adapter_orders: list[AdapterOrder] = field(default_factory=list)

    @property
    def total_num_scheduled_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(self.num_tokens)

    @property
    def is_empty(self) -> bool:
        """Nothing to carry out."""
        return not (self.requests or self.loads or self.stores or self.adapter_orders)

    def work(self) -> StepWork:
        """What its duration depends on. A chunk whose tokens are all followed by a choice is a decode."""
        num_choosing = list(map(operator.sub, self.num_logits, self.num_prompt_logits))
        chunks = zip(self.num_tokens, num_choosing, strict=True)
        num_prefill = sum(count for count, num_chosen in chunks if num_chosen < count)
        num_context = sum(self.start_positions) + sum(self.num_tokens)
        num_decodes = sum(map(operator.eq, self.num_tokens, num_choosing))
        return StepWork(num_prefill, num_decodes, num_context)

    def append(
        self,
        request: Request,
        start: int,
        count: int,
        num_known: int,
        num_logits: int,
        prompt_targets: Sequence[int] = (),
    ) -> None:
        """Schedule `count` tokens of a request that has a row; its known token ids are added apart."""
        self.requests.append(request)
        self.generations.append(request.num_preemptions)
        self.rows.append(request.row)
        self.start_positions.append(start)
        self.num_tokens.append(count)
        self.write_from.append(request.num_kv_tokens)
        self.num_logits.append(num_logits)
        self.num_prompt_logits.append(len(prompt_targets))
        self.prompt_targets += prompt_targets
        self.num_known.append(num_known)

    def running_requests(self) -> Iterator[Request]:
        """The scheduled requests that are neither gone nor preempted since."""
        for request, generation in zip(self.requests, self.generations, strict=True):
            if request.num_preemptions == generation and request.status is RequestStatus.RUNNING:
                yield request

    def chunks(self) -> Iterator[Chunk]:
        """The columns as rows; slower than the columns."""
        at = 0
        for i, request in enumerate(self.requests):
            token_ids = self.token_ids[at : at + self.num_known[i]]
            at += self.num_known[i]
            yield Chunk(
                request,
                self.rows[i],
                self.start_positions[i],
                self.num_tokens[i],
                self.write_from[i],
                self.num_logits[i],
                token_ids,
            )


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """A plan as every rank sees it; the columns are those of SchedulerOutput."""

    sequence: int  # counts up from 1; a rank that misses one needs a full plan
    is_full: bool  # every row that it schedules is among new_rows
    rows: Ints
    start_positions: Ints
    num_tokens: Ints
    write_from: Ints
    num_logits: Ints
    num_prompt_logits: Ints
    num_known: Ints
    token_ids: Ints
    prompt_targets: Ints
    new_rows: Sequence[RowState]
    new_blocks: Ints  # [n, 4]: group, row, index, block id
    loads: Sequence[BlockTransfer]
    stores: Sequence[BlockTransfer]
    ends_prompts: bool
    polls: Sequence[int]  # transfers whose end the leader asks for; where there is one rank it knows
    adapter_orders: Sequence[AdapterOrder] = ()

    @property
    def num_requests(self) -> int:
        """Scheduled requests."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """What became of a plan; the same on every rank but for the tokens, which only the leader needs."""

    sampled_token_ids: Sequence[int] = ()  # one per wanted row of logits, in the plan's order
    reports: Sequence[RowReport | None] = ()  # likewise; none at all where no request of the plan asks for some
    transfers: Sequence[TransferDone] = ()  # of those that were polled: the ones that ended on every rank
    features: object | None = None  # hidden states of the plan's tokens; only the drafter that wants them looks inside


class ModelRunner(Protocol):
    """Carries out plans on one rank; every rank of a worker gets the same ones."""

    def poll(self, transfer_ids: Sequence[int]) -> Sequence[TransferDone]:
        """Which of these have ended on every rank. On all ranks at once, in the thread that gets the plans."""
        ...

    def start(self, plan: StepPlan, ended: Sequence[TransferDone] = ()) -> Callable[[], ModelRunnerOutput]:
        """One step; what is returned waits for its end. ended: what poll said of plan.polls."""
        ...

    def ended_transfers(self) -> Sequence[int]:
        """Transfers whose I/O is over on this rank, and whose end no plan has polled yet."""
        ...

    def recover(self) -> None:
        """After a step raised: forget all transfers, once none moves bytes any more. The next plan is full."""
        ...


class Executor(Protocol):
    """Carries out plans on all ranks of a worker."""

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """One step, which may still run on return; what is returned waits for its end. Steps run in order."""
        ...

    @property
    def has_ended_transfers(self) -> bool:
        """Whether a step now, even an empty one, might report the end of a transfer."""
        ...

    def resend(self) -> None:
        """A rank has lost its rows: the next plan is full."""
        ...

    def recover(self) -> str:
        """After a step raised: all ranks give up the steps in flight and forget all transfers; the next plan is full.

        Which ranks raised what, where there are several. Raises RankLost when a rank does not come back.
        """
        ...

    def stop(self) -> None:
        """Let the other ranks go; no step may follow."""
        ...
