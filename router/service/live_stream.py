"""One stream from placement to its end: places it, submits its parts, passes its tokens to the reader, places it anew.

What it does next is decided in placement.streams, where it goes in placement.policy; here are the clocks and the
waiting. Knows nothing of text, of APIs, or of what a client may ask for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from router.errors import Cancelled, DeadlineExceeded, InvalidRequest, NoWorker, RouterError, WorkersLost
from router.events import FinishReason, RequestStats, TokenLogprobs
from router.fleet.fleet import BlockNames, extend_names
from router.fleet.messages import PartOrder
from router.placement.policy import Placement, Reject, RejectReason, RouteRequest
from router.placement.streams import Action, CancelPart, ContinuePart, PartReport, Phase, Stream, SubmitPart
from router.sampling import SamplingParams
from router.service.token_request import TokenRequest

if TYPE_CHECKING:
    from router.service.dispatch import Dispatcher

log = logging.getLogger(__name__)

_FIRST_RETRY_S, _LAST_RETRY_S = 0.05, 1.0


class LiveStream:
    """One stream from placement to its end. start(), then next() until it gives nothing; close() in any case."""

    def __init__(self, dispatcher: Dispatcher, request: TokenRequest, emitted: Sequence[int], num_given: int) -> None:
        self._dispatcher = dispatcher
        self._request = request
        sampling = request.sampling
        assert sampling.max_tokens is not None, "max_tokens is set before a stream is opened"
        # By position; of position 0 there is none. A reader that has tokens has these, too.
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        if sampling.prompt_logprobs is not None and not num_given:
            self._prompt_logprobs = [None] * len(request.token_ids)
        needs_prefill = len(self._prompt_logprobs) > 1
        self._state = Stream(len(request.token_ids), sampling.max_tokens, emitted, needs_prefill)
        self._logprobs: dict[int, TokenLogprobs] = {}  # by position, of tokens that the reader does not have
        self._wake = asyncio.Event()
        self._num_taken = num_given  # tokens that next() gave and whose reader came back
        self._num_given = num_given
        self._num_credited = num_given
        self._placement: Placement | None = None
        self._placed_s = 0.0
        self._is_held_back = False  # the reader was slower than the worker: no measure of the worker's speed
        self._first_s: float | None = None  # of the stream
        self._segment: tuple[int, float] | None = None  # tokens and time at the placement's first token
        self._last_s = 0.0
        self._prefill_worker_id = ""
        self._decode_worker_id = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._is_closed = False

    # -- for the reader

    async def start(self) -> None:
        """Wait for the first placement. Raises what kept it from happening."""
        if self._request.deadline_s is not None:
            left_s = self._request.deadline_s - self._dispatcher.clock()
            self._deadline = asyncio.get_running_loop().call_later(left_s, self._on_deadline)
        await self._place()
        if isinstance(self._state.ending, RouterError):
            raise self._state.ending

    async def next(self) -> Sequence[int]:
        """All tokens committed since the last call; none of them at the end. Raises the failure of the stream."""
        self._credit()
        state = self._state
        while True:
            if len(state.emitted) > self._num_given:
                tokens = state.emitted[self._num_given :]
                self._num_given = len(state.emitted)
                return tokens
            if state.phase is Phase.ENDED:
                if isinstance(state.ending, RouterError):
                    raise state.ending
                return ()
            if state.phase is Phase.PLACING:
                await self._place()
                continue
            await self._wait_for_token()

    def take_logprobs(self, first_position: int, count: int) -> tuple[TokenLogprobs, ...]:
        """Of tokens that next() gave, where the request asked for them; else none."""
        found = [self._logprobs.pop(position, None) for position in range(first_position, first_position + count)]
        return tuple(one for one in found if one is not None)

    def take_prompt_logprobs(self) -> Sequence[TokenLogprobs | None]:
        """One for each token of the prompt, where they are asked for; once, after next() gave something."""
        taken, self._prompt_logprobs = self._prompt_logprobs, []
        return taken

    def finish(self) -> None:
        """The reader has enough: a stop text was found."""
        self._do(self._state.end(FinishReason.STOP))

    def fail(self, error: RouterError) -> None:
        """End it by our own choice; its reader gets the error after the tokens that came before."""
        self._do(self._state.fail(error))
        self._wake.set()

    def close(self) -> None:
        """Let go of everything; a stream that runs is cancelled at its workers. Harmless when repeated."""
        if self._is_closed:
            return
        self._is_closed = True
        self._do(self._state.fail(Cancelled("the client went away")))
        if self._deadline is not None:
            self._deadline.cancel()
        self._release()
        if self._decode_worker_id and isinstance(self._state.ending, FinishReason):
            self._dispatcher.fleet.remember(self._decode_worker_id, self._names())
        self._dispatcher.observer.closed(self._state.num_dropped, self._state.kv_transfer)

    @property
    def reason(self) -> FinishReason:
        """Why it ended well."""
        assert isinstance(self._state.ending, FinishReason), "asked for the reason of a stream that did not end well"
        return self._state.ending

    def stats(self) -> RequestStats:
        """What it cost so far."""
        state, arrived_s = self._state, self._request.arrived_s
        return RequestStats(
            ttft_s=(self._first_s - arrived_s) if self._first_s is not None else 0.0,
            duration_s=self._dispatcher.clock() - arrived_s,
            num_cached_prompt_tokens=state.num_cached_prompt_tokens,
            num_computed_prompt_tokens=state.num_computed_prompt_tokens,
            num_recomputed_prompt_tokens=state.num_recomputed_prompt_tokens,
            num_transferred_blocks=state.num_transferred_blocks,
            prefill_worker_id=self._prefill_worker_id,
            decode_worker_id=self._decode_worker_id,
            num_replacements=max(0, state.epoch - 1),
            num_drafts=state.num_drafts,
            num_draft_tokens=state.num_draft_tokens,
            num_accepted_tokens=state.num_accepted_tokens,
        )

    # -- StreamSink: called by connections

    def on_token(
        self, worker_id: str, epoch: int, position: int, token_id: int, logprobs: TokenLogprobs | None = None
    ) -> None:
        num_before = len(self._state.emitted)
        actions = self._state.on_token(worker_id, epoch, position, token_id)
        if len(self._state.emitted) > num_before:
            self._note_token()
            if logprobs is not None:
                self._logprobs[num_before] = logprobs
        if actions:
            self._do(actions)
        self._wake.set()

    def on_prompt_logprobs(
        self, worker_id: str, epoch: int, first_position: int, logprobs: Sequence[TokenLogprobs]
    ) -> None:
        end = first_position + len(logprobs)
        if first_position > 0 and end <= len(self._prompt_logprobs):  # else they were taken, or the worker is broken
            self._prompt_logprobs[first_position:end] = logprobs
            self._state.needs_prefill = None in self._prompt_logprobs[1:]

    def on_finished(self, worker_id: str, epoch: int, report: PartReport) -> None:
        self._do(self._state.on_finished(worker_id, epoch, report))
        self._wake.set()

    def on_lost(self, worker_id: str) -> None:
        self._do(self._state.on_lost(worker_id))
        self._wake.set()

    # -- placement

    async def _place(self) -> None:
        """Place, waiting for a worker as long as the config allows; the state says how it went."""
        dispatcher, state = self._dispatcher, self._state
        is_new = state.epoch == 0
        if not is_new:
            await self._before_replacement()
        wait_s = dispatcher.config.new_request_wait_s if is_new else dispatcher.config.replacement_wait_s
        give_up_s = dispatcher.clock() + wait_s
        while state.phase is Phase.PLACING:
            if dispatcher.weights() != self._request.weights:
                self._do(state.fail(WorkersLost("the weights that the stream began with are not served any more")))
                return
            result = self._pick()
            if isinstance(result, Placement):
                self._on_placed(result)
                return
            left_s = give_up_s - dispatcher.clock()
            if is_new and result.reason is RejectReason.TOO_LARGE:
                self._do(state.fail(InvalidRequest(result.message, param="prompt")))
            elif left_s <= 0:
                self._do(state.fail(NoWorker(result.message, retry_after_s=1.0)))
            else:
                await dispatcher.wait_for_worker(self._wake, left_s)

    async def _before_replacement(self) -> None:
        dispatcher, state = self._dispatcher, self._state
        if self._segment is not None:
            dispatcher.fleet.stored(self._names())  # the lost worker had computed, and so published, nearly all of it
        self._release()
        if state.epoch > dispatcher.config.max_replacements:
            message = f"placed {state.epoch} times and lost each time; last: {state.last_failure}"
            self._do(state.fail(WorkersLost(message)))
            return
        log.info(
            "stream %s is placed anew at position %d: %s",
            self._request.stream_id,
            len(state.emitted),
            state.last_failure,
        )
        dispatcher.observer.replaced()
        if any(worker_id in dispatcher.connections for worker_id in state.failed_on):
            # It refused rather than died, and may be the only one: do not ask again at once.
            await asyncio.sleep(min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** (state.epoch - 1)))

    def _pick(self) -> Placement | Reject:
        state = self._state
        request = RouteRequest(
            request_id=self._request.stream_id,
            num_prompt_tokens=state.num_prompt_tokens + len(state.emitted),
            num_output_tokens=state.max_tokens - len(state.emitted),
            avoid=frozenset(state.failed_on),
            adapter=self._dispatcher.adapter_need(self._request.adapter),
        )
        return self._dispatcher.fleet.pick(request, self._names(), self._dispatcher.clock())

    def _names(self) -> BlockNames:
        if not self._state.emitted:
            return self._request.names
        request = self._request
        token_ids = [*request.token_ids, *self._state.emitted]
        return extend_names(request.names, token_ids, request.tenant_salt, request.adapter_digest)

    def _on_placed(self, placement: Placement) -> None:
        self._placement = placement
        self._placed_s = self._dispatcher.clock()
        self._segment = None
        self._prefill_worker_id = placement.prefill_id or placement.decode_id
        self._decode_worker_id = placement.decode_id
        if self._state.epoch == 0:
            self._dispatcher.observer.placed(placement, self._placed_s - self._request.arrived_s)
        self._num_credited = self._num_taken
        self._do(self._state.place(placement))

    # -- carrying out

    def _do(self, actions: Sequence[Action]) -> None:
        stream_id = self._request.stream_id
        for action in actions:
            connection = self._dispatcher.connections.get(action.worker_id)
            if connection is None:
                continue  # lost a moment ago: its on_lost follows, or was what led here
            if isinstance(action, SubmitPart):
                connection.submit(self._order(action), self)
            elif isinstance(action, ContinuePart):
                connection.let_continue(stream_id, action.token_ids)
            elif isinstance(action, CancelPart):
                connection.cancel(stream_id)

    def _order(self, action: SubmitPart) -> PartOrder:
        state, request = self._state, self._request
        return PartOrder(
            stream_id=request.stream_id,
            epoch=action.epoch,
            part=action.part,
            token_ids=[*request.token_ids, *state.emitted],
            num_prompt_tokens=state.num_prompt_tokens,
            sampling=self._sampling(),
            # What the reader has not taken yet counts against the window; 0 would mean no window.
            window_tokens=max(1, self._dispatcher.config.window_tokens - (len(state.emitted) - self._num_taken)),
            deadline_s=request.worker_deadline_s(self._dispatcher.clock()),
            tenant_salt=request.tenant_salt,
            tenant=request.tenant,
            priority=request.priority,
            adapter=request.adapter,
        )

    def _sampling(self) -> SamplingParams:
        """What the next part goes by: the prompt's logprobs are wanted once."""
        if self._request.sampling.prompt_logprobs is None or self._state.needs_prefill:
            return self._request.sampling
        return dataclasses.replace(self._request.sampling, prompt_logprobs=None)

    async def _wait_for_token(self) -> None:
        """Until something happened; a placement that brings nothing for too long is given up.

        The reader has everything, so its window is open: that nothing comes is the worker's doing.
        """
        config = self._dispatcher.config
        wait_s = config.first_token_wait_s if self._segment is None else config.next_token_wait_s
        try:
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
            self._wake.clear()
        except TimeoutError:
            self._do(self._state.on_stalled(wait_s))

    def _credit(self) -> None:
        # The reader came back, so it has taken what it was given. Half a window at a time keeps these messages few.
        self._num_taken = self._num_given
        num_owed = self._num_taken - self._num_credited
        if num_owed < max(1, self._dispatcher.config.window_tokens // 2) or self._state.phase is Phase.ENDED:
            return
        connection = self._dispatcher.connections.get(self._decode_worker_id)
        if connection is not None:
            connection.credit(self._request.stream_id, num_owed)
            self._num_credited = self._num_taken

    def _note_token(self) -> None:
        now_s = self._dispatcher.clock()
        self._last_s = now_s
        num_emitted = len(self._state.emitted)
        if num_emitted - self._num_taken > self._dispatcher.config.window_tokens // 2:
            self._is_held_back = True
        if self._segment is not None:
            return
        self._segment = (num_emitted, now_s)
        self._dispatcher.fleet.first_token(self._request.stream_id, now_s)
        if self._first_s is None:
            assert self._placement is not None, "a token came before a placement"
            self._first_s = now_s
            predicted_s = self._placement.cost.ttft_ms / 1000
            self._dispatcher.observer.first_token(now_s - self._request.arrived_s, predicted_s)

    def _release(self) -> None:
        if self._segment is not None and not self._is_held_back:
            num_tokens, since_s = self._segment
            num_steps = len(self._state.emitted) - num_tokens
            self._dispatcher.fleet.observe_decode(self._decode_worker_id, num_steps, self._last_s - since_s)
        self._segment = None
        self._dispatcher.fleet.release(self._request.stream_id)

    def _on_deadline(self) -> None:
        waited_for = "placement" if self._state.phase is Phase.PLACING else self._state.phase.value
        self.fail(DeadlineExceeded(f"deadline exceeded while {waited_for}"))
