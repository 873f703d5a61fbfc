"""Runs requests to completion: takes them in, steps the scheduler and the executor, hands out tokens and ends.

Several steps are in flight at a time: one for each pipeline stage, and with async scheduling one more, which is planned
and started before the tokens of the oldest are read. A step that raises costs the requests in it, not the engine. Knows
nothing of gRPC, text, Ray or other workers. Not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from checkpoint.adapters.directory import DIGEST_BYTES
from grammars.compiler import GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar
from workers.engine.adapters.ref import AdapterRef
from workers.engine.outcome import UpdateResult
from workers.engine.request import FinishReason, PromptLogprobs, Request, RequestEnd, TokenOutputs
from workers.engine.scheduler import Scheduler
from workers.engine.speculation import Speculation
from workers.engine.step import Executor, ModelRunnerOutput, SchedulerOutput
from workers.errors import InvalidRequest, RankLost, StepFailed

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row: then it is not the requests, and the worker ends

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What one step produced."""

    tokens: TokenOutputs = field(default_factory=TokenOutputs)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    ended: list[RequestEnd] = field(default_factory=list)
    published_names: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class EngineCounters:
    """Grow from 0 at the engine's start."""

    num_steps: int = 0
    num_computed_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_published_blocks: int = 0
    num_transferred_blocks: int = 0
    step_seconds: float = 0.0
    step_requests: int = 0  # running ones, added up over the steps
    step_context_tokens: int = 0  # space that their contexts take up, added up likewise


class Engine:
    """One worker's engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        vocab_size: int,
        clock: Clock,
        async_scheduling: bool = False,
        grammars: GrammarCompiler | None = None,
        adapter_timeout_s: float = 60.0,
        speculation: Speculation | None = None,
    ) -> None:
        """grammars: of the model's tokenizer; without it a request that has a grammar is refused. adapter_timeout_s:
        how long a request waits for its adapter to be read. speculation: proposes draft tokens, where there is
        speculative decoding."""
        self._adapter_timeout_s = adapter_timeout_s
        self.scheduler = scheduler
        self.counters = EngineCounters()
        self._step_began_s = self._step_ended_s = 0.0
        self._executor = executor
        self._vocab_size = vocab_size
        self._clock = clock
        self._num_ahead = scheduler.config.num_stages - 1 + async_scheduling  # steps started before one is waited for
        self._grammars = grammars
        self.speculation = speculation
        self._in_flight: deque[tuple[SchedulerOutput, Callable[[], ModelRunnerOutput]]] = deque()
        self._num_failed_steps = 0  # in a row
        self._next_deadline_s = math.inf  # no request here has an earlier one

    def check(self, request: Request) -> None:
        """Raise InvalidRequest when a request can never be served here; else name its blocks. Takes long for a long
        prompt, changes nothing but the request, and may be called from any thread."""
        limit = self.scheduler.max_context_tokens
        if not 0 < request.num_prompt_tokens <= request.num_tokens:
            raise InvalidRequest(f"num_prompt_tokens: {request.num_prompt_tokens} of {request.num_tokens} token_ids")
        if request.num_tokens >= limit:
            raise InvalidRequest(f"token_ids: {request.num_tokens} tokens leave no space in a context of {limit}")
        if min(request.token_ids) < 0 or max(request.token_ids) >= self._vocab_size:
            raise InvalidRequest(f"token_ids: ids must be in [0, {self._vocab_size})")
        if request.sampling.max_tokens <= request.num_output_tokens:
            raise InvalidRequest(f"sampling.max_tokens: {request.sampling.max_tokens} are generated already")
        if request.sampling.grammar is not None:
            self._check_grammar(request.sampling.grammar)
        if request.adapter is not None:
            self._check_adapter(request.adapter)
        self.scheduler.name_blocks(request)
        request.is_checked = True

    def _check_adapter(self, ref: AdapterRef) -> None:
        if not self.scheduler.adapters.limits.num_slots:
            raise InvalidRequest("adapter: this worker takes none (enable_lora is off)")
        if len(ref.digest) != DIGEST_BYTES:
            raise InvalidRequest(f"adapter.digest: has {len(ref.digest)} bytes, not {DIGEST_BYTES}")
        if not ref.path or "\0" in ref.path:
            raise InvalidRequest("adapter.path: no path")

    def _check_grammar(self, grammar: Grammar) -> None:
        if self._grammars is None:
            raise InvalidRequest("sampling.grammar: this engine serves no structured output")
        try:
            self._grammars.matcher(grammar)
        except GrammarError as error:
            raise InvalidRequest(f"sampling.grammar: {error}") from None

    def submit(self, request: Request) -> None:
        """Take a request in. Raises InvalidRequest."""
        if request.request_id in self.scheduler.requests:
            raise InvalidRequest(f"stream_id: {request.request_id} is in use")
        if not request.is_checked:
            self.check(request)
        self.scheduler.add(request)
        self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)

    def continue_request(self, request_id: str, token_ids: list[int]) -> RequestEnd | None:
        """Let a request that waits for KV begin to decode; ends it when the tokens already complete it."""
        request = self.scheduler.requests.get(request_id)
        if request is not None and request.continued_time_s is None:
            request.continued_time_s = self._clock()
        self.scheduler.continue_request(request_id, token_ids)
        if request is not None and request.num_tokens >= request.max_num_tokens:
            return self._end(request, FinishReason.LENGTH)
        return None

    def cancel(self, request_id: str) -> RequestEnd | None:
        """Stop a request; None when it is not here."""
        request = self.scheduler.requests.get(request_id)
        return None if request is None else self._end(request, FinishReason.CANCELLED)

    def pin_adapters(self, owner: str, refs: Sequence[AdapterRef]) -> None:
        """As AdapterBook.pin; what this engine cannot take is left out."""
        taken = [ref for ref in refs if len(ref.digest) == DIGEST_BYTES and ref.path]
        self.scheduler.adapters.pin(owner, taken if self.scheduler.adapters.limits.num_slots else ())

    def credit(self, request_id: str, num_tokens: int) -> None:
        """Widen a request's window."""
        request = self.scheduler.requests.get(request_id)
        if request is not None:
            request.window_tokens += num_tokens

    def expire(self) -> Iterator[RequestEnd]:
        """End what is past its deadline."""
        now = self._clock()
        if now >= self._next_deadline_s:  # called before each step: all requests are looked at only when one is due
            for request in [r for r in self.scheduler.requests.values() if r.deadline_s <= now]:
                yield self._end(request, FinishReason.CANCELLED)
            self._next_deadline_s = min((r.deadline_s for r in self.scheduler.requests.values()), default=math.inf)
        overdue = self.scheduler.adapters.overdue(self.scheduler.waiting, now, self._adapter_timeout_s)
        for request in list(overdue):
            yield self._end(request, FinishReason.ADAPTER_FAILED)

    def step(self) -> StepEvents | None:
        """One step; None when there is nothing to do before a command comes or a transfer ends.

        With several in flight a step is started, and what is returned is of the oldest, once so many are started.
        """
        if self.speculation is not None:
            self.speculation.propose(self.scheduler)
        plan = self.scheduler.schedule()
        is_due = not plan.is_empty or (not self._in_flight and self._executor.has_ended_transfers)
        if is_due:
            self._note_start(plan, is_first=not self._in_flight)
            self._in_flight.append((plan, self._start(plan)))
        if self._in_flight and (len(self._in_flight) > self._num_ahead or not is_due):
            return self._take(*self._in_flight.popleft())
        # Who was preempted may come back at once.
        return StepEvents() if self._in_flight or plan.has_preempted else None

    def _start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """An error comes out when the step's turn is there: those before it may be well."""
        try:
            return self._executor.start(plan)
        except Exception as error:
            return partial(_raise, error)

    @property
    def awaits_ranks(self) -> bool:
        """A transfer has ended here, but not yet on every rank: a step finds out."""
        return self._executor.has_ended_transfers

    def resend_state(self) -> None:
        """A rank joined, or missed plans: the next plan has the whole state. No step may be running."""
        assert not self._in_flight, "a rank that does not know a step's rows cannot take part in it"
        self.scheduler.rows.resend()
        self._executor.resend()

    def _note_start(self, plan: SchedulerOutput, is_first: bool) -> None:
        now = self._clock()
        if is_first:
            self._step_began_s = now
        for request in plan.requests:
            if request.first_step_time_s is None:
                request.first_step_time_s = now

    def _take(self, plan: SchedulerOutput, result: Callable[[], ModelRunnerOutput]) -> StepEvents | None:
        """What a step that is through means for the requests."""
        if self.speculation is not None and self._num_ahead:
            self.speculation.while_computing(plan)
        try:
            output = result()
        except RankLost:
            raise
        except Exception as error:
            return self._give_up(plan, error)
        update = self.scheduler.update(plan, output)
        if output.features is not None and self.speculation is not None:
            self.speculation.computed(plan, output.features)
        if not plan.is_empty:
            self._num_failed_steps = 0
            now = self._clock()
            self.scheduler.budgets.step_took(plan, now - self._step_began_s, now - self._step_ended_s)
            if self.speculation is not None:
                self.speculation.step_took(plan, update.judged, now - self._step_began_s)
            self._step_ended_s = now
            self._count_step(now)
        events = self._events_of(update)
        if plan.is_empty and not output.transfers:
            return None  # it asked for transfers that have not ended everywhere
        return events

    def _events_of(self, update: UpdateResult) -> StepEvents:
        now = self._clock()
        for request in update.tokens.requests:
            if request.first_token_time_s is None:
                request.first_token_time_s = now
        self.counters.num_generated_tokens += len(update.tokens)
        self.counters.num_published_blocks += len(update.published_names)
        self.counters.num_computed_prompt_tokens += update.num_computed_prompt_tokens
        self.counters.num_transferred_blocks += update.num_transferred_blocks
        ended = [self._end(request, reason) for request, reason in update.finished]
        return StepEvents(update.tokens, update.prompt_logprobs, ended, update.published_names)

    def _give_up(self, failed: SchedulerOutput, error: Exception) -> StepEvents:
        """A step raised: end its requests, and begin anew with all others. Raises StepFailed after too many in a row.

        What is in flight behind it may have read what it did not write, so that it is given up too and computed again.
        """
        self._num_failed_steps += 1
        later = [plan for plan, _ in self._in_flight]
        self._in_flight.clear()
        why = self._executor.recover() or f"{type(error).__name__}: {error}".splitlines()[0]
        log.error("a step of %d requests failed: %s", len(failed.requests), why, exc_info=error)
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise StepFailed(f"{self._num_failed_steps} steps in a row failed; the last: {why}") from error
        ended = [self._end(request, FinishReason.STEP_FAILED, why) for request in failed.running_requests()]
        events = self._events_of(self.scheduler.abandon(failed, later))
        return StepEvents(events.tokens, events.prompt_logprobs, ended + events.ended, events.published_names)

    def _count_step(self, now_s: float) -> None:
        """With async scheduling the next step has begun; it counts from here on."""
        counters, scheduler = self.counters, self.scheduler
        counters.num_steps += 1
        counters.step_seconds += now_s - self._step_began_s
        self._step_began_s = now_s
        counters.step_requests += len(scheduler.running)
        counters.step_context_tokens += (
            scheduler.pool.num_blocks - scheduler.pool.num_free
        ) * scheduler.pool.block_size

    def close(self) -> None:
        """Let the other ranks go; no step may follow."""
        try:
            for _, result in self._in_flight:
                result()
        finally:
            self._executor.stop()

    def _end(self, request: Request, reason: FinishReason, error: str = "") -> RequestEnd:
        self.scheduler.finish(request)
        if self.speculation is not None:
            self.speculation.forget(request)
        self.counters.num_cached_prompt_tokens += request.num_cached_prompt_tokens
        return RequestEnd(
            request.request_id,
            request.epoch,
            reason,
            request.num_cached_prompt_tokens,
            request.num_computed_prompt_tokens,
            request.num_tokens - request.num_given_tokens,
            request.num_transferred_blocks,
            request.num_published_blocks,
            request.num_drafts,
            request.num_draft_tokens,
            request.num_accepted_tokens,
            request.arrival_time_s,
            request.continued_time_s,
            request.first_step_time_s,
            request.first_token_time_s,
            error or request.error or (_no_choice(request) if reason is FinishReason.NO_CHOICE else ""),
            request.embedding if reason is FinishReason.EMBEDDED else (),
        )


def _no_choice(request: Request) -> str:
    field = "banned_token_ids" if request.sampling.grammar is None else "grammar"
    return f"{field}: no token is left that bans, bad words and the grammar allow, or finding one is too much work"


def _raise(error: Exception) -> NoReturn:
    raise error
