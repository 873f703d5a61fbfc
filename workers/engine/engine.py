"""Runs requests to completion: takes them in, steps the scheduler and the executor, hands out tokens and ends.

With async scheduling a step is planned and started before the tokens of the one before it are read. Knows nothing of
gRPC, text, Ray or other workers. Not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from grammars.compiler import GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar
from workers.engine.request import FinishReason, PromptLogprobs, Request, RequestEnd, TokenOutputs
from workers.engine.scheduler import Scheduler
from workers.engine.step import Executor, ModelRunnerOutput, SchedulerOutput
from workers.errors import InvalidRequest

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
    ) -> None:
        """grammars: of the model's tokenizer; without it a request that has a grammar is refused."""
        self.scheduler = scheduler
        self.counters = EngineCounters()
        self._step_began_s = 0.0
        self._executor = executor
        self._vocab_size = vocab_size
        self._clock = clock
        self._async_scheduling = async_scheduling
        self._grammars = grammars
        self._in_flight: tuple[SchedulerOutput, Callable[[], ModelRunnerOutput]] | None = None

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
        self.scheduler.name_blocks(request)
        request.is_checked = True

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

    def credit(self, request_id: str, num_tokens: int) -> None:
        """Widen a request's window."""
        request = self.scheduler.requests.get(request_id)
        if request is not None:
            request.window_tokens += num_tokens

    def expire(self) -> Iterator[RequestEnd]:
        """End what is past its deadline."""
        now = self._clock()
        for request in [r for r in self.scheduler.requests.values() if r.deadline_s <= now]:
            yield self._end(request, FinishReason.CANCELLED)

    def step(self) -> StepEvents | None:
        """One step; None when there is nothing to do before a command comes or a transfer ends.

        With async scheduling a step is started, and what is returned is of the one before it.
        """
        before, self._in_flight = self._in_flight, None
        plan = self.scheduler.schedule()
        is_due = not plan.is_empty or (before is None and self._executor.has_ended_transfers)
        if is_due:
            self._note_start(plan, is_first=before is None)
            self._in_flight = plan, self._executor.start(plan)
        if before is None and not self._async_scheduling:
            before, self._in_flight = self._in_flight, None
        if before is not None:
            return self._take(*before)
        # Who was preempted may come back at once.
        return StepEvents() if self._in_flight is not None or plan.has_preempted else None

    @property
    def awaits_ranks(self) -> bool:
        """A transfer has ended here, but not yet on every rank: a step finds out."""
        return self._executor.has_ended_transfers

    def resend_state(self) -> None:
        """A rank joined, or missed plans: the next plan has the whole state. No step may be running."""
        assert self._in_flight is None, "a rank that does not know a step's rows cannot take part in it"
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
        output = result()
        now = self._clock()
        update = self.scheduler.update(plan, output)
        for request in update.tokens.requests:
            if request.first_token_time_s is None:
                request.first_token_time_s = now
        if not plan.is_empty:
            self.scheduler.step_took(plan, now - self._step_began_s)
            self._count_step(now)
        self.counters.num_generated_tokens += len(update.tokens)
        self.counters.num_published_blocks += len(update.published_names)
        self.counters.num_computed_prompt_tokens += update.num_computed_prompt_tokens
        self.counters.num_transferred_blocks += update.num_transferred_blocks
        ended = [self._end(request, reason) for request, reason in update.finished]
        if plan.is_empty and not output.transfers:
            return None  # it asked for transfers that have not ended everywhere
        return StepEvents(update.tokens, update.prompt_logprobs, ended, update.published_names)

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
            if self._in_flight is not None:
                self._in_flight[1]()
        finally:
            self._executor.stop()

    def _end(self, request: Request, reason: FinishReason) -> RequestEnd:
        self.scheduler.finish(request)
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
            request.arrival_time_s,
            request.continued_time_s,
            request.first_step_time_s,
            request.first_token_time_s,
        )
