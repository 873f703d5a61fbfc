"""WorkerService: carries requests from routers to the engine's loop, and tokens back.

Everything that one engine step made ready for a router travels in one TokenBatch. Knows nothing of tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
from switchyard.v1 import adapter_pb2, generation_pb2
from switchyard.v1 import worker_pb2 as pb

from checkpoint.identity import ServedModel
from workers.engine.adapters.ref import AdapterRef
from workers.engine.engine import Clock
from workers.engine.loop import Cancel, Continue, Credit, EngineLoop, FollowBlocks, LoopEvents, PinAdapters, Submit
from workers.engine.request import FinishReason, Pooling, PromptLogprobs, Request, RequestEnd, RequestRole
from workers.errors import InvalidRequest
from workers.sampling.params import SamplingParams, TokenLogprobs
from workers.server.block_events import BlockFeed
from workers.server.demand import Demand
from workers.server.outbox import Outbox
from workers.server.registration import Phase, Registration
from workers.server.registration_servicer import RegistrationServicer

log = logging.getLogger(__name__)

MAX_REQUESTS = 1 << 14  # of all routers: bounds what waits for the engine's thread
MAX_MESSAGE_BYTES = 64 << 20  # a submit carries a whole prompt as token ids
_LOAD_PERIOD_S = 0.05
_LOAD_MAX_AGE_S = 1.0

_ROLES = {
    pb.REQUEST_ROLE_MIXED: RequestRole.MIXED,
    pb.REQUEST_ROLE_PREFILL: RequestRole.PREFILL,
    pb.REQUEST_ROLE_DECODE: RequestRole.DECODE,
    pb.REQUEST_ROLE_EMBED: RequestRole.EMBED,
}
_OUTCOMES = {
    FinishReason.STOP: pb.REQUEST_OUTCOME_STOP,
    FinishReason.LENGTH: pb.REQUEST_OUTCOME_LENGTH,
    FinishReason.CANCELLED: pb.REQUEST_OUTCOME_CANCELLED,
    FinishReason.PREFILLED: pb.REQUEST_OUTCOME_PREFILLED,
    FinishReason.FAILED: pb.REQUEST_OUTCOME_FAILED,
    FinishReason.STEP_FAILED: pb.REQUEST_OUTCOME_STEP_FAILED,
    FinishReason.EMBEDDED: pb.REQUEST_OUTCOME_PREFILLED,
    FinishReason.NO_CHOICE: pb.REQUEST_OUTCOME_FAILED,
    FinishReason.ADAPTER_FAILED: pb.REQUEST_OUTCOME_ADAPTER_FAILED,
    FinishReason.ADAPTER_UNFIT: pb.REQUEST_OUTCOME_ADAPTER_FAILED,
}
_ERRORS = {
    FinishReason.FAILED: "the model's logits are no finite numbers (an overflow, or a damaged weight or device)",
}
_NO_LIMIT = 1 << 62
_LONG_PROMPT_TOKENS = 2048


def _pooling(submit: pb.Submit) -> Pooling:
    return Pooling.MEAN if submit.pooling == generation_pb2.POOLING_MEAN else Pooling.LAST


def _adapter(message: adapter_pb2.Adapter) -> AdapterRef:
    return AdapterRef(message.name, message.digest, message.path)


def logprobs_message(found: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    """Of one token."""
    return generation_pb2.TokenLogprobs(logprob=found.logprob, top_ids=found.top_ids, top_logprobs=found.top_logprobs)


@dataclass(eq=False, slots=True)
class Connection:
    """One router's stream, and the requests that came over it."""

    router_id: str
    epoch: int
    outbox: Outbox = field(default_factory=Outbox)
    request_ids: dict[str, str] = field(default_factory=dict)  # by stream id
    is_quiet: bool = False  # the router has seen that the worker retired: nothing new comes from it


class WorkerServicer(RegistrationServicer):
    """Lives on one asyncio loop; the engine's thread reports to it through `deliver`."""

    def __init__(self, hello: pb.WorkerHello, load: Callable[[], pb.WorkerLoad], clock: Clock) -> None:
        super().__init__(hello, clock)
        self._load = load
        self._engine: EngineLoop | None = None
        self._asyncio = asyncio.get_running_loop()
        self._connections: dict[str, Connection] = {}  # by router id
        self._owners: dict[str, tuple[Connection, str]] = {}  # request id -> connection, stream id
        self._blocks = BlockFeed(hello.worker_id, self._post)
        self.demand = Demand()

    def attach(self, engine: EngineLoop, registration: Registration) -> None:
        """Give the servicer the loop that serves its requests, and its worker's place in the cluster."""
        self._engine, self._registration = engine, registration

    def lease(self, epoch: int, is_new: bool) -> None:
        """Go by this epoch of the lease; a new registration ends what routers have begun: they place it elsewhere."""
        self._hello.lease_epoch = epoch
        if is_new:
            for connection in list(self._connections.values()):
                self._abandon(connection)
                connection.outbox.close()

    @property
    def num_requests(self) -> int:
        """Requests that run here or wait to."""
        return len(self._owners)

    def retire(self) -> None:
        """Tell the routers that the worker has left the directory."""
        for connection in self._connections.values():
            self._tell_retired(connection)

    @property
    def is_quiet(self) -> bool:
        """Whether all routers have seen it."""
        return all(connection.is_quiet for connection in self._connections.values())

    def _tell_retired(self, connection: Connection) -> None:
        connection.outbox.put(pb.ConnectResponse(retired=pb.Retired()))

    def move_streams(self) -> None:
        """End the connections that streams run over: their routers place them elsewhere."""
        for connection in [c for c in self._connections.values() if c.request_ids]:
            self.demand.num_moved_streams += len(connection.request_ids)
            self._abandon(connection)
            connection.outbox.close()

    def _post(self, command: Submit | Cancel | Continue | Credit | FollowBlocks | PinAdapters) -> None:
        assert self._engine is not None
        self._engine.post(command)

    # --------------------------------------------------------------------------------------------------------- the RPCs
    async def GetLoad(self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadResponse:
        """What the worker is doing now."""
        return pb.GetLoadResponse(worker=self._hello, load=self._load(), status=self._status())

    async def WatchBlocks(
        self,
        request: pb.WatchBlocksRequest,
        context: grpc.aio.ServicerContext[pb.WatchBlocksRequest, pb.WatchBlocksResponse],
    ) -> None:
        """Which blocks the device holds."""
        await self._blocks.follow(context.write)

    async def Connect(
        self, requests: AsyncIterator[pb.ConnectRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ConnectResponse]:
        """One router's stream."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("message") != "hello" or not first.hello.router_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello with a router_id")
            return
        difference = ServedModel.of(self._hello.served).difference(ServedModel.of(first.hello.served))
        if difference:  # its clients would get this model's tokens for another's
            yield pb.ConnectResponse(hello=self._hello)  # so that it can say which worker it met
            why = f"router {first.hello.router_id} serves something else: {difference}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        connection = await self._open(first.hello, context)
        tasks = [
            asyncio.create_task(self._receive(requests, connection)),
            asyncio.create_task(self._send_load(connection)),
        ]
        try:
            yield pb.ConnectResponse(hello=self._hello)
            if self._attached.phase is not Phase.READY:
                self._tell_retired(connection)
            while (message := await connection.outbox.get()) is not None:
                yield message
        finally:
            for task in tasks:
                task.cancel()
            self._abandon(connection)

    async def _open(self, hello: pb.RouterHello, context: grpc.aio.ServicerContext) -> Connection:
        old = self._connections.get(hello.router_id)
        if old is not None:
            if old.epoch >= hello.epoch:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, f"epoch {hello.epoch} is not above {old.epoch}"
                )
            self._abandon(old)
            old.outbox.close()
        connection = Connection(hello.router_id, hello.epoch)
        self._connections[hello.router_id] = connection
        return connection

    async def _receive(self, requests: AsyncIterator[pb.ConnectRequest], connection: Connection) -> None:
        try:
            async for message in requests:
                if message.WhichOneof("message") == "submit":
                    await self._submit(message.submit, connection)
                else:
                    self._handle(message, connection)
        except grpc.RpcError:
            pass  # the stream broke
        finally:
            connection.outbox.close()

    def _handle(self, message: pb.ConnectRequest, connection: Connection) -> None:
        match message.WhichOneof("message"):
            case "cancel":
                self._with_request(connection, message.cancel.stream_id, Cancel)
            case "continue":
                body = getattr(message, "continue")
                token_ids = list(body.token_ids)
                self._with_request(connection, body.stream_id, lambda r: Continue(r, token_ids))
            case "credit":
                num_tokens = message.credit.num_tokens
                self._with_request(connection, message.credit.stream_id, lambda r: Credit(r, num_tokens))
            case "retired_seen":
                connection.is_quiet = True
            case "pin_adapters":
                refs = [_adapter(one) for one in message.pin_adapters.adapters]
                self._post(PinAdapters(connection.router_id, refs))
            case "ping":
                connection.outbox.put(pb.ConnectResponse(pong=pb.Pong(nonce=message.ping.nonce)))

    def _with_request(
        self, connection: Connection, stream_id: str, command: Callable[[str], Cancel | Continue | Credit]
    ) -> None:
        request_id = connection.request_ids.get(stream_id)
        if request_id is not None:
            self._post(command(request_id))

    async def _submit(self, submit: pb.Submit, connection: Connection) -> None:
        role = _ROLES.get(submit.role)
        if role is None:
            self._refuse(connection, submit.stream_id, submit.epoch, f"role: {submit.role} is not a role")
            return
        if self.num_requests >= MAX_REQUESTS:
            why = f"this worker has {self.num_requests} requests already"
            self._refuse(connection, submit.stream_id, submit.epoch, why, is_invalid=False)
            return
        old = connection.request_ids.get(submit.stream_id)
        if old is not None:  # a newer placement of the stream on the same worker
            self._owners.pop(old, None)
            self._post(Cancel(old))
        request_id = f"{connection.router_id}/{connection.epoch}/{submit.stream_id}/{submit.epoch}"
        connection.request_ids[submit.stream_id] = request_id
        self._owners[request_id] = (connection, submit.stream_id)
        request = Request(
            request_id,
            list(submit.token_ids),
            submit.num_prompt_tokens,
            SamplingParams.of(submit.sampling),
            role=role,
            pooling=_pooling(submit) if role is RequestRole.EMBED else None,
            adapter=_adapter(submit.adapter) if submit.HasField("adapter") else None,
            tenant_salt=submit.tenant_salt,
            tenant=submit.tenant,
            priority=submit.priority,
            epoch=submit.epoch,
            deadline_s=self._clock() + submit.deadline_s if submit.deadline_s > 0 else float("inf"),
            window_tokens=submit.window_tokens or _NO_LIMIT,
        )
        self.demand.came(request)
        if request.num_tokens >= _LONG_PROMPT_TOKENS or request.sampling.grammar is not None:
            await asyncio.to_thread(self._check, request)
            if connection.request_ids.get(submit.stream_id) != request_id:
                return  # the connection ended meanwhile, and its requests with it
        self._post(Submit(request))

    def _check(self, request: Request) -> None:
        """Checks a long prompt, or compiles a grammar, off the threads on which others' tokens go by."""
        assert self._engine is not None
        with contextlib.suppress(InvalidRequest):  # the engine finds it too, and refuses it
            self._engine.check(request)

    async def _send_load(self, connection: Connection) -> None:
        sent, age_s = None, 0.0
        while True:
            load = self._load()
            if load != sent or age_s >= _LOAD_MAX_AGE_S:
                connection.outbox.put_load(load)
                sent, age_s = load, 0.0
            await asyncio.sleep(_LOAD_PERIOD_S)
            age_s += _LOAD_PERIOD_S

    def _abandon(self, connection: Connection) -> None:
        """Cancel what is left of a connection that is gone."""
        if self._connections.get(connection.router_id) is connection:
            del self._connections[connection.router_id]
            self._post(PinAdapters(connection.router_id, ()))
        for request_id in connection.request_ids.values():
            self._owners.pop(request_id, None)
            self._post(Cancel(request_id))
        connection.request_ids.clear()

    # ----------------------------------------------------------------------------------------- from the engine's thread
    def deliver(self, events: LoopEvents) -> None:
        """Called on the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is stopping
            self._asyncio.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: LoopEvents) -> None:
        for found in events.step.prompt_logprobs:
            self._send_prompt_logprobs(found)
        for connection, batch in self._token_batches(events):
            connection.outbox.put(pb.ConnectResponse(tokens=batch))
        for end in events.step.ended:
            self.demand.ended(end)
            self._finish(end)
        for refused in events.refused:
            owner = self._owners.pop(refused.request.request_id, None)
            if owner is not None:
                owner[0].request_ids.pop(owner[1], None)
                self._refuse(*owner, refused.request.epoch, refused.error)
        self._blocks.take(events)

    def _send_prompt_logprobs(self, found: PromptLogprobs) -> None:
        owner = self._owners.get(found.request.request_id)
        if owner is None:
            return
        connection, stream_id = owner
        message = pb.PartPromptLogprobs(
            stream_id=stream_id,
            epoch=found.request.epoch,
            first_position=found.first_position,
            logprobs=[logprobs_message(one) for one in found.logprobs],
        )
        connection.outbox.put(pb.ConnectResponse(prompt_logprobs=message))

    def _token_batches(self, events: LoopEvents) -> list[tuple[Connection, pb.TokenBatch]]:
        batches: dict[Connection, tuple[pb.TokenBatch, dict[str, int]]] = {}
        tokens = events.step.tokens
        logprobs = dict(zip(tokens.logprob_indices, tokens.logprobs, strict=True))
        columns = zip(tokens.requests, tokens.positions, tokens.token_ids, strict=True)
        for index_of_token, (request, position, token_id) in enumerate(columns):
            owner = self._owners.get(request.request_id)
            if owner is None:
                continue
            connection, stream_id = owner
            batch, index = batches.setdefault(connection, (pb.TokenBatch(), {}))
            if stream_id not in index:
                index[stream_id] = len(index)
                batch.stream_ids.append(stream_id)
                batch.epochs.append(request.epoch)
            if (found := logprobs.get(index_of_token)) is not None:
                batch.logprob_index.append(len(batch.token_ids))
                batch.logprobs.append(logprobs_message(found))
            batch.stream_index.append(index[stream_id])
            batch.positions.append(position)
            batch.token_ids.append(token_id)
        return [(connection, batch) for connection, (batch, _) in batches.items()]

    def _finish(self, end: RequestEnd) -> None:
        owner = self._owners.pop(end.request_id, None)
        if owner is None:
            return
        connection, stream_id = owner
        connection.request_ids.pop(stream_id, None)
        finished = pb.RequestFinished(
            stream_id=stream_id,
            epoch=end.epoch,
            outcome=_OUTCOMES[end.reason],
            error=_ERRORS.get(end.reason, end.error),
            is_invalid_request=end.reason in (FinishReason.NO_CHOICE, FinishReason.ADAPTER_UNFIT),
            num_cached_prompt_tokens=end.num_cached_prompt_tokens,
            num_computed_prompt_tokens=end.num_computed_prompt_tokens,
            num_transferred_blocks=end.num_transferred_blocks,
            num_published_blocks=end.num_published_blocks,
            num_drafts=end.num_drafts,
            num_draft_tokens=end.num_draft_tokens,
            num_accepted_tokens=end.num_accepted_tokens,
            times=self._times(end),
            embedding=end.embedding,
        )
        connection.outbox.put(pb.ConnectResponse(finished=finished))

    def _times(self, end: RequestEnd) -> pb.PartTimes:
        epoch_s = time.time() - self._clock()  # a router may compare them with those of another host

        def unix_s(time_s: float | None) -> float:
            return 0.0 if time_s is None else epoch_s + time_s

        return pb.PartTimes(
            continued_s=unix_s(end.continued_time_s),
            first_step_s=unix_s(end.first_step_time_s),
            first_token_s=unix_s(end.first_token_time_s),
        )

    def _refuse(self, connection: Connection, stream_id: str, epoch: int, error: str, is_invalid: bool = True) -> None:
        finished = pb.RequestFinished(
            stream_id=stream_id,
            epoch=epoch,
            outcome=pb.REQUEST_OUTCOME_FAILED,
            error=error,
            is_invalid_request=is_invalid,
        )
        connection.outbox.put(pb.ConnectResponse(finished=finished))
