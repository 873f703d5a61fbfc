"""One embedding: a prompt goes to the worker that prefills best, and comes back as one vector.

A worker that is lost or fails is replaced as a stream's would be; nothing was given out, so all begins anew. Knows
nothing of text or of APIs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from router.errors import DeadlineExceeded, InvalidRequest, NoWorker, RouterError, WorkersLost
from router.events import Embedding, Pooling, TokenLogprobs
from router.fleet.messages import PartOrder
from router.placement.policy import Placement, Reject, RejectReason, RouteRequest
from router.placement.streams import MAX_SAME_FAILURES, Outcome, Part, PartReport, refusal_of, same_failure
from router.service.dispatch import Dispatcher
from router.service.token_request import TokenRequest

_RETRY_S = 0.05


class _Part:
    """What a worker says of one attempt: a StreamSink."""

    def __init__(self) -> None:
        self.report: asyncio.Future[PartReport | None] = asyncio.get_running_loop().create_future()

    def on_token(
        self, worker_id: str, epoch: int, position: int, token_id: int, logprobs: TokenLogprobs | None = None
    ) -> None:
        """A worker that chooses tokens does not know the role."""

    def on_prompt_logprobs(
        self, worker_id: str, epoch: int, first_position: int, logprobs: Sequence[TokenLogprobs]
    ) -> None:
        """None are asked for."""

    def on_finished(self, worker_id: str, epoch: int, report: PartReport) -> None:
        self._end(report)

    def on_lost(self, worker_id: str) -> None:
        self._end(None)

    def _end(self, report: PartReport | None) -> None:
        if not self.report.done():
            self.report.set_result(report)


async def embed(dispatcher: Dispatcher, request: TokenRequest, pooling: Pooling) -> Embedding:
    """The vector as the model gives it. Raises RouterError."""
    left_s = None if request.deadline_s is None else request.deadline_s - dispatcher.clock()
    try:
        async with asyncio.timeout(left_s):
            return await _embed(dispatcher, request, pooling)
    except TimeoutError:
        raise DeadlineExceeded("deadline exceeded while embedding") from None


async def _embed(dispatcher: Dispatcher, request: TokenRequest, pooling: Pooling) -> Embedding:
    failed: set[str] = set()
    same_failures: dict[Outcome, list[str]] = {Outcome.STEP_FAILED: [], Outcome.ADAPTER_FAILED: []}
    why = ""
    for epoch in range(1, dispatcher.config.max_replacements + 2):
        worker_id = await _place(dispatcher, request, frozenset(failed), is_new=epoch == 1)
        try:
            report = await _ask(dispatcher, request, pooling, worker_id, epoch)
        finally:
            dispatcher.fleet.release(request.stream_id)
        if report is not None and report.embedding:
            cached = report.num_cached_prompt_tokens
            return Embedding(report.embedding, len(request.token_ids), cached, worker_id)
        if report is not None and (refusal := refusal_of(report)) is not None:
            raise refusal
        if report is not None and report.outcome in same_failures:
            same_failures[report.outcome].append(worker_id)
            if len(same_failures[report.outcome]) >= MAX_SAME_FAILURES:
                raise same_failure(report, same_failures[report.outcome])
        why = f"{worker_id}: {'connection lost' if report is None else report.error or report.outcome.value}"
        failed.add(worker_id)
        if worker_id in dispatcher.connections:  # it failed rather than died, and may be the only one
            await asyncio.sleep(_RETRY_S)
    raise WorkersLost(f"placed {len(failed)} times and lost each time; last: {why}")


async def _place(dispatcher: Dispatcher, request: TokenRequest, avoid: frozenset[str], is_new: bool) -> str:
    """The worker that computes it; reserved."""
    route = RouteRequest(request.stream_id, len(request.token_ids), 1, avoid, dispatcher.adapter_need(request.adapter))
    wait_s = dispatcher.config.new_request_wait_s if is_new else dispatcher.config.replacement_wait_s
    give_up_s = dispatcher.clock() + wait_s
    while True:
        found = dispatcher.fleet.pick(route, request.names, dispatcher.clock())
        if isinstance(found, Placement):
            return found.prefill_id or found.decode_id
        left_s = give_up_s - dispatcher.clock()
        if left_s <= 0 or found.reason is RejectReason.TOO_LARGE:
            raise _refusal(found)
        await dispatcher.wait_for_worker(asyncio.Event(), left_s)


def _refusal(reject: Reject) -> RouterError:
    if reject.reason is RejectReason.TOO_LARGE:
        return InvalidRequest(reject.message, param="prompt")
    return NoWorker(reject.message, retry_after_s=1.0)


async def _ask(
    dispatcher: Dispatcher, request: TokenRequest, pooling: Pooling, worker_id: str, epoch: int
) -> PartReport | None:
    """What became of it on one worker; None when the worker was lost."""
    connection = dispatcher.connections.get(worker_id)
    if connection is None:
        return None
    part = _Part()
    order = PartOrder(
        stream_id=request.stream_id,
        epoch=epoch,
        part=Part.EMBED,
        token_ids=request.token_ids,
        num_prompt_tokens=len(request.token_ids),
        sampling=request.sampling,
        window_tokens=0,
        deadline_s=request.worker_deadline_s(dispatcher.clock()),
        tenant_salt=request.tenant_salt,
        tenant=request.tenant,
        priority=request.priority,
        pooling=pooling,
        adapter=request.adapter,
    )
    connection.submit(order, part)
    try:
        return await part.report
    finally:
        if not part.report.done():
            connection.cancel(request.stream_id)
