"""A worker without an engine: a real WorkerService on a real port, whose tokens are a hash of the history.

So any worker continues any stream the same way, and a test can say what the whole stream must be, whatever was killed.
Roles, Continue, windows and cancels are honoured; prefill and decode workers share a set of prompts instead of KV.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
from switchyard.v1 import generation_pb2, identity_pb2, worker_pb2, worker_pb2_grpc

from workers.engine.loop import FollowBlocks, LoopEvents
from workers.server.block_events import BlockFeed

VOCAB_SIZE = 4096
BLOCK_SIZE = 16
CONTEXT_TOKENS = 2048
ROLES = {
    "mixed": worker_pb2.WORKER_ROLE_MIXED,
    "prefill": worker_pb2.WORKER_ROLE_PREFILL,
    "decode": worker_pb2.WORKER_ROLE_DECODE,
}


def next_token(history: Sequence[int], adapter: bytes = b"") -> int:
    """The one token that follows this history with an adapter of this digest; never 0, the end of text."""
    digest = hashlib.blake2b(array("I", history).tobytes(), digest_size=8, key=adapter).digest()
    return 1 + int.from_bytes(digest) % (VOCAB_SIZE - 1)


def expected_tokens(prompt: Sequence[int], num_tokens: int, adapter: bytes = b"") -> list[int]:
    """What every worker makes of a prompt; adapter: digest."""
    history = list(prompt)
    for _ in range(num_tokens):
        history.append(next_token(history, adapter))
    return history[len(prompt) :]


@dataclass(eq=False)
class _Part:
    """One request on its way through the fake."""

    submit: worker_pb2.Submit
    num_allowed: float
    has_credit: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Future[list[int]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Connection:
    outbox: asyncio.Queue[worker_pb2.ConnectResponse] = field(default_factory=asyncio.Queue)
    parts: dict[str, _Part] = field(default_factory=dict)


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """start(), then let routers come; kill() is abrupt, and start() works again after it, on the same port."""

    def __init__(self, worker_id: str, role: str, prefilled: set[tuple[int, ...]] | None = None) -> None:
        self.worker_id = worker_id
        self.role = role
        self.pool = role
        self.prefilled = set() if prefilled is None else prefilled  # histories whose KV can be had
        self.step_s = 0.0  # time per token
        self.prefill_s = 0.0  # time per prompt
        self.stop_at: int | None = None  # the position at which a stop token is chosen
        self.answer: Sequence[int] | None = None  # what it says to every prompt, before a stop token
        self.die_after: int | None = None  # tokens sent in all, then kill() by itself
        self.hang_after: int | None = None  # tokens sent in all, then none, though it lives and answers
        self.refuse_with: worker_pb2.RequestFinished | None = None  # last word on every submit
        self.bend: list[int] = []  # offsets added to the next tokens' positions, one each: a broken worker
        self.load = worker_pb2.WorkerLoad(num_free_blocks=1000)
        self.hello_worker_id = worker_id
        self.lease_epoch = 0  # as it says
        self.num_blocks = 1000
        self.served: identity_pb2.ServedModel | None = None  # None: whatever the router serves
        self.kv_fingerprint = b"fingerprint-0001"
        self.submits: list[worker_pb2.Submit] = []
        self.cancels: list[str] = []
        self.credits = 0
        self.pins: list[list[bytes]] = []  # digests, as routers sent them
        self.num_sent = 0
        self.num_connections = 0
        self.held: dict[bytes, None] | None = None  # blocks by name; None: it cannot tell, as workers once could not
        self.num_block_events_to_drop = 0  # of its blocks, messages that never arrive
        self.num_watches = 0  # times that a router asked for a snapshot
        self.is_mute = False  # says nothing any more, as a stopped process
        self.address = ""
        self._feed = BlockFeed(worker_id, self._follow_blocks)
        self._server: grpc.aio.Server | None = None
        self._live: set[_Part] = set()
        self._connections: list[_Connection] = []
        self._death: asyncio.Task[None] | None = None

    @property
    def num_live(self) -> int:
        """Requests that it works on now."""
        return len(self._live)

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def kill(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def holds_adapters(self, *on_device: bytes, on_host: Sequence[bytes] = (), num_slots: int = 4) -> None:
        """As it tells its routers from now on."""
        self.load = worker_pb2.WorkerLoad(
            num_free_blocks=1000, num_adapter_slots=num_slots, device_adapters=on_device, host_adapters=on_host
        )
        for connection in self._connections:
            connection.outbox.put_nowait(worker_pb2.ConnectResponse(load=self.load))

    # -- blocks

    def hold(self, names: Sequence[bytes]) -> None:
        """As if it had computed these blocks."""
        assert self.held is not None
        self.held.update(dict.fromkeys(names))
        self._feed.take(LoopEvents(block_changes=dict.fromkeys(names, True)))

    def evict(self, names: Sequence[bytes]) -> None:
        """As an engine evicts when it needs free blocks."""
        assert self.held is not None
        for name in names:
            del self.held[name]
        self._feed.take(LoopEvents(block_changes=dict.fromkeys(names, False)))

    def _follow_blocks(self, command: FollowBlocks) -> None:
        if command.is_on:
            self._feed.take(LoopEvents(held_blocks=list(self.held or ())))

    # -- WorkerService

    async def WatchBlocks(self, request: worker_pb2.WatchBlocksRequest, context: grpc.aio.ServicerContext) -> None:
        if self.held is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not by this one")
        self.num_watches += 1

        async def write(message: worker_pb2.WatchBlocksResponse) -> None:
            if self.num_block_events_to_drop > 0 and message.WhichOneof("message") == "changes":
                self.num_block_events_to_drop -= 1
            else:
                await context.write(message)

        await self._feed.follow(write)

    async def Connect(self, request_iterator: AsyncIterator[worker_pb2.ConnectRequest], context: object) -> None:
        first = await anext(request_iterator)
        assert first.WhichOneof("message") == "hello"
        self.num_connections += 1
        connection = _Connection()
        self._connections.append(connection)
        connection.outbox.put_nowait(worker_pb2.ConnectResponse(hello=self._hello(first.hello.served)))
        connection.outbox.put_nowait(worker_pb2.ConnectResponse(load=self.load))
        listening = asyncio.create_task(self._listen(request_iterator, connection))
        try:
            while True:
                message = await connection.outbox.get()
                if not self.is_mute:
                    await context.write(message)
        finally:
            listening.cancel()
            self._connections.remove(connection)
            for part in connection.parts.values():
                if part.task is not None:
                    part.task.cancel()

    async def _listen(self, requests: AsyncIterator[worker_pb2.ConnectRequest], connection: _Connection) -> None:
        async for request in requests:
            self._handle(request, connection)

    def _handle(self, request: worker_pb2.ConnectRequest, connection: _Connection) -> None:
        kind = request.WhichOneof("message")
        if kind == "submit":
            self.submits.append(request.submit)
            assert request.submit.stream_id not in connection.parts, "submitted twice without a cancel"
            part = _Part(request.submit, request.submit.window_tokens or float("inf"))
            connection.parts[request.submit.stream_id] = part
            part.task = asyncio.create_task(self._work(part, connection))
        elif kind == "cancel":
            self.cancels.append(request.cancel.stream_id)
            cancelled = connection.parts.pop(request.cancel.stream_id, None)
            if cancelled is not None and cancelled.task is not None:
                cancelled.task.cancel()
        elif kind == "continue":
            message = getattr(request, "continue")
            if message.stream_id in connection.parts:
                connection.parts[message.stream_id].go_on.set_result(list(message.token_ids))
        elif kind == "credit":
            self.credits += 1
            if request.credit.stream_id in connection.parts:
                widened = connection.parts[request.credit.stream_id]
                widened.num_allowed += request.credit.num_tokens
                widened.has_credit.set()
        elif kind == "pin_adapters":
            self.pins.append([adapter.digest for adapter in request.pin_adapters.adapters])
        elif kind == "ping":
            connection.outbox.put_nowait(worker_pb2.ConnectResponse(pong=worker_pb2.Pong(nonce=request.ping.nonce)))

    def _hello(self, theirs: identity_pb2.ServedModel) -> worker_pb2.WorkerHello:
        return worker_pb2.WorkerHello(
            worker_id=self.hello_worker_id,
            role=ROLES[self.role],
            model=generation_pb2.ModelInfo(name="fake", context_tokens=CONTEXT_TOKENS, vocab_size=VOCAB_SIZE),
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            kv_fingerprint=self.kv_fingerprint,
            lease_epoch=self.lease_epoch,
            served=self.served or theirs,
        )

    # -- one request

    async def _work(self, part: _Part, connection: _Connection) -> None:
        self._live.add(part)
        try:
            finished = self.refuse_with or await self._tokens(part, connection)
            finished.stream_id, finished.epoch = part.submit.stream_id, part.submit.epoch
            connection.outbox.put_nowait(worker_pb2.ConnectResponse(finished=finished))
            connection.parts.pop(part.submit.stream_id, None)
        finally:
            self._live.discard(part)

    async def _tokens(self, part: _Part, connection: _Connection) -> worker_pb2.RequestFinished:
        submit = part.submit
        history = list(submit.token_ids)
        finished = worker_pb2.RequestFinished()
        if submit.role == worker_pb2.REQUEST_ROLE_PREFILL:
            await asyncio.sleep(self.prefill_s)
            finished.num_computed_prompt_tokens = len(history)
            self.prefilled.add(tuple(history))
            finished.outcome = await self._emit(part, connection, history) or worker_pb2.REQUEST_OUTCOME_PREFILLED
            finished.times.first_token_s = time.time()
            return finished
        if submit.role == worker_pb2.REQUEST_ROLE_DECODE:
            first = await part.go_on
            finished.times.continued_s = finished.times.first_step_s = time.time()
            if tuple(history) in self.prefilled:
                finished.num_transferred_blocks = -(-len(history) // BLOCK_SIZE)
            else:
                finished.num_computed_prompt_tokens = len(history)
            history += first
        else:
            await asyncio.sleep(self.prefill_s)
            finished.num_computed_prompt_tokens = len(history)
        while len(history) - submit.num_prompt_tokens < submit.sampling.max_tokens:
            outcome = await self._emit(part, connection, history)
            if outcome:
                finished.outcome = outcome
                return finished
        finished.outcome = worker_pb2.REQUEST_OUTCOME_LENGTH
        return finished

    async def _emit(self, part: _Part, connection: _Connection, history: list[int]) -> int:
        """Choose and send the next token; an outcome when that was a stop token."""
        await asyncio.sleep(self.step_s)
        if self._is_to_die() or (self.hang_after is not None and self.num_sent >= self.hang_after):
            await asyncio.Event().wait()  # not one token more
        position = len(history) - part.submit.num_prompt_tokens
        if position == (self.stop_at if self.answer is None else len(self.answer)):
            return worker_pb2.REQUEST_OUTCOME_STOP
        while part.num_allowed < 1:
            part.has_credit.clear()
            await part.has_credit.wait()
        part.num_allowed -= 1
        digest = part.submit.adapter.digest
        history.append(next_token(history, digest) if self.answer is None else self.answer[position])
        bent = position + (self.bend.pop(0) if self.bend else 0)
        batch = worker_pb2.TokenBatch(
            stream_ids=[part.submit.stream_id],
            epochs=[part.submit.epoch],
            stream_index=[0],
            positions=[bent],
            token_ids=[history[-1]],
        )
        connection.outbox.put_nowait(worker_pb2.ConnectResponse(tokens=batch))
        self.num_sent += 1
        self._is_to_die()
        return 0

    def _is_to_die(self) -> bool:
        """Whether it has sent all that it may; its death is under way then. die_after may be set at any time."""
        if self.die_after is None or self.num_sent < self.die_after:
            return False
        if self._death is None:
            self._death = asyncio.create_task(self._die())
        return True

    async def _die(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self.kill()
