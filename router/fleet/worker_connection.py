"""One connection to one worker: dials, says hello, carries all streams between the two, redials when it breaks.

Fans token batches out to the streams that wait for them and notifies them when the worker is lost. Knows nothing of
placement, of clients, or of what a stream does with its tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import grpc
from switchyard.v1 import worker_pb2, worker_pb2_grpc

from checkpoint.identity import ServedModel
from kvstore.control.directory import LeasedWorker
from kvstore.network.channels import dial_async
from router.events import AdapterRef, TokenLogprobs
from router.fleet.block_events import BlockListener, watch_blocks
from router.fleet.fleet import WorkerInfo
from router.fleet.identity import ServedIdentity
from router.fleet.messages import PartOrder, part_report, pin_message, submit_message, token_logprobs, worker_info
from router.placement.streams import PartReport

log = logging.getLogger(__name__)

CLOSED = "closed by this router"  # why a connection went down, when nothing went wrong
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.1, 2.0


class StreamSink(Protocol):
    """Who waits for a part's tokens. Called from the event loop; must not block."""

    def on_token(
        self, worker_id: str, epoch: int, position: int, token_id: int, logprobs: TokenLogprobs | None = None
    ) -> None: ...

    def on_prompt_logprobs(
        self, worker_id: str, epoch: int, first_position: int, logprobs: Sequence[TokenLogprobs]
    ) -> None: ...

    def on_finished(self, worker_id: str, epoch: int, report: PartReport) -> None: ...

    def on_lost(self, worker_id: str) -> None: ...


class WorkerListener(BlockListener, Protocol):
    """Takes what concerns the worker itself."""

    def on_up(self, connection: WorkerConnection, info: WorkerInfo) -> None: ...

    def on_load(self, worker_id: str, load: worker_pb2.WorkerLoad) -> None: ...

    def on_retired(self, worker_id: str) -> None: ...

    def on_down(self, connection: WorkerConnection, why: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """What all connections of a router share."""

    router_id: str
    next_epoch: Callable[[], int]  # grows with every dial
    served: ServedIdentity  # a worker that serves something else is left
    silence_s: float  # a worker that sends nothing for so long is lost
    max_message_bytes: int


class ConnectionBroken(Exception):
    """The connection cannot go on; the message says why."""


class WorkerRefused(ConnectionBroken):
    """This router must not use the worker, now or later."""


@dataclass(slots=True)
class _Attached:
    epoch: int
    sink: StreamSink


class WorkerConnection:
    """The router's end of WorkerService.Connect to one worker."""

    def __init__(self, leased: LeasedWorker, options: ConnectionOptions, events: WorkerListener) -> None:
        self.worker_id = leased.record.worker_id
        self.address = leased.record.address
        self.pool = leased.record.pool
        self.lease_epoch = leased.epoch  # the greatest that the directory or the worker named; it never goes back
        self.is_up = False
        self.is_retired = False  # the worker says that it has left the directory
        self.refusal = ""  # why the two do not belong together, while they do not
        self.stays = True  # redial when it breaks; membership turns it off when the directory no longer has the worker
        self._options = options
        self._events = events
        self._sinks: dict[str, _Attached] = {}
        self._outbox: deque[worker_pb2.ConnectRequest] = deque()
        self._has_mail = asyncio.Event()
        self._last_message_s = 0.0
        self._pinned: tuple[AdapterRef, ...] = ()

    # -- orders, all without waiting: the outbox is bounded by what admission lets in

    def submit(self, order: PartOrder, sink: StreamSink) -> None:
        """Give the worker a part; its tokens go to the sink until it finished, was cancelled or is lost."""
        self._sinks[order.stream_id] = _Attached(order.epoch, sink)
        self._send(submit_message(order))

    def let_continue(self, stream_id: str, token_ids: Sequence[int]) -> None:
        """The prefill side of a stream is through."""
        message = worker_pb2.Continue(stream_id=stream_id, token_ids=token_ids)
        self._send(worker_pb2.ConnectRequest(**{"continue": message}))

    def cancel(self, stream_id: str) -> None:
        """Drop a part; its tokens go nowhere from now on."""
        self._sinks.pop(stream_id, None)
        self._send(worker_pb2.ConnectRequest(cancel=worker_pb2.Cancel(stream_id=stream_id)))

    def credit(self, stream_id: str, num_tokens: int) -> None:
        """Widen a stream's window."""
        self._send(worker_pb2.ConnectRequest(credit=worker_pb2.Credit(stream_id=stream_id, num_tokens=num_tokens)))

    def pin(self, refs: Sequence[AdapterRef]) -> None:
        """These adapters stay on the worker's device while nobody uses them; sent when they are others than before."""
        if self.is_up and tuple(refs) != self._pinned:
            self._pinned = tuple(refs)
            self._send(pin_message(refs))

    @property
    def num_streams(self) -> int:
        """Parts that run over this connection."""
        return len(self._sinks)

    def _send(self, message: worker_pb2.ConnectRequest) -> None:
        if self.is_up:
            self._outbox.append(message)
            self._has_mail.set()

    # -- life

    async def run(self) -> None:
        """Serve until cancelled, or until the connection breaks and the worker is not wanted any more."""
        backoff_s = _FIRST_BACKOFF_S
        while self.stays:
            dialled_s = time.monotonic()
            why = "the connection failed"
            try:
                why = await self._session()
            except ConnectionBroken as error:
                why = str(error)
                self._note_refusal(why if isinstance(error, WorkerRefused) else "")
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {error.details()}"
                self._note_refusal("")
            except asyncio.CancelledError:
                why = CLOSED
                raise
            finally:
                was_up = self.is_up
                self._down(why)
            if not was_up:
                log.debug("worker %s at %s does not answer: %s", self.worker_id, self.address, why)
            if time.monotonic() - dialled_s > _LAST_BACKOFF_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(_LAST_BACKOFF_S, 2 * backoff_s)

    def _note_refusal(self, why: str) -> None:
        if why and why != self.refusal:
            log.error("worker %s at %s is not used: %s", self.worker_id, self.address, why)
        self.refusal = why

    async def _session(self) -> str:
        options = [
            # Each dial has its own TCP connection: no back-off is inherited from one that failed.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", self._options.max_message_bytes),
            ("grpc.max_send_message_length", self._options.max_message_bytes),
        ]
        async with dial_async(self.address, options) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            call = stub.Connect()
            try:
                await self._greet(call)
                return await self._serve(call, watch_blocks(stub, self.worker_id, self._events))
            finally:
                call.cancel()

    async def _greet(self, call: grpc.aio.StreamStreamCall) -> None:
        hello = worker_pb2.RouterHello(
            router_id=self._options.router_id,
            epoch=self._options.next_epoch(),
            served=self._options.served.configured.message(),
        )
        try:
            async with asyncio.timeout(self._options.silence_s):
                await call.write(worker_pb2.ConnectRequest(hello=hello))
                answer = await call.read()
        except TimeoutError:
            raise ConnectionBroken("no hello came") from None
        except asyncio.InvalidStateError:
            raise ConnectionBroken("the call ended before a hello came") from None
        if answer is grpc.aio.EOF or answer.WhichOneof("message") != "hello":
            raise ConnectionBroken("the worker did not begin with a hello")
        self._up(self._check(answer.hello))

    def _check(self, hello: worker_pb2.WorkerHello) -> WorkerInfo:
        info = worker_info(hello, self.pool)
        if info is None:
            raise ConnectionBroken("its hello names no known role, or no block size")
        if info.worker_id != self.worker_id:
            raise ConnectionBroken(f"another worker answers there: {info.worker_id}")
        if 0 < hello.lease_epoch < self.lease_epoch:
            raise ConnectionBroken(f"it goes by lease {hello.lease_epoch}, the directory by {self.lease_epoch}")
        difference = self._options.served.join(ServedModel.of(hello.served))
        if difference:
            raise WorkerRefused(f"it serves something else: {difference}")
        self.lease_epoch = max(self.lease_epoch, hello.lease_epoch)
        return info

    def _up(self, info: WorkerInfo) -> None:
        self._outbox.clear()
        self._pinned = ()
        self._last_message_s = time.monotonic()
        self.refusal = ""
        self.is_up = True
        self._events.on_up(self, info)

    def _down(self, why: str) -> None:
        if not self.is_up:
            return
        self.is_up = False
        self._options.served.leave()
        self._outbox.clear()
        lost, self._sinks = self._sinks, {}
        # on_down first: it stops placement on this worker before the lost streams are placed anew.
        self._events.on_down(self, why)
        for attached in lost.values():
            attached.sink.on_lost(self.worker_id)

    async def _serve(self, call: grpc.aio.StreamStreamCall, watching_blocks: Coroutine[Any, Any, NoReturn]) -> str:
        tasks: list[asyncio.Task[str]] = [
            asyncio.create_task(watching_blocks, name=f"blocks {self.worker_id}"),
            asyncio.create_task(self._read(call), name=f"read {self.worker_id}"),
            asyncio.create_task(self._write(call), name=f"write {self.worker_id}"),
            asyncio.create_task(self._watch(), name=f"watch {self.worker_id}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: grpc.aio.StreamStreamCall) -> str:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                return f"the worker ended the connection ({(await call.code()).name}: {await call.details()})"
            self._last_message_s = time.monotonic()
            try:
                self._take(message)
            except (IndexError, ValueError) as error:
                raise ConnectionBroken(f"a malformed message came: {error}") from error

    def _take(self, message: worker_pb2.ConnectResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "tokens":
            self._fan_out(message.tokens)
        elif kind == "prompt_logprobs":
            found = message.prompt_logprobs
            if (attached := self._sinks.get(found.stream_id)) is not None:
                logprobs = [token_logprobs(one) for one in found.logprobs]
                attached.sink.on_prompt_logprobs(self.worker_id, found.epoch, found.first_position, logprobs)
        elif kind == "finished":
            self._finish(message.finished)
        elif kind == "load":
            self._events.on_load(self.worker_id, message.load)
        elif kind == "retired":
            self.is_retired, self.stays = True, False
            self._events.on_retired(self.worker_id)
            self._send(worker_pb2.ConnectRequest(retired_seen=worker_pb2.RetiredSeen()))

    def _fan_out(self, batch: worker_pb2.TokenBatch) -> None:
        epochs = batch.epochs
        sinks = [self._sinks.get(stream_id) for stream_id in batch.stream_ids]
        entries = zip(batch.stream_index, batch.positions, batch.token_ids, strict=True)
        logprobs = dict(zip(batch.logprob_index, map(token_logprobs, batch.logprobs), strict=True))
        for i, (index, position, token_id) in enumerate(entries):
            attached = sinks[index]
            if attached is not None:
                attached.sink.on_token(self.worker_id, epochs[index], position, token_id, logprobs.get(i))

    def _finish(self, finished: worker_pb2.RequestFinished) -> None:
        attached = self._sinks.get(finished.stream_id)
        if attached is None or attached.epoch != finished.epoch:
            return  # of a part that was cancelled, perhaps in favour of the part that is there now
        del self._sinks[finished.stream_id]
        attached.sink.on_finished(self.worker_id, finished.epoch, part_report(finished))

    async def _write(self, call: grpc.aio.StreamStreamCall) -> str:
        while True:
            await self._has_mail.wait()
            self._has_mail.clear()
            while self._outbox:
                try:
                    await call.write(self._outbox.popleft())
                except asyncio.InvalidStateError:
                    return f"the call is over ({(await call.code()).name}: {await call.details()})"

    async def _watch(self) -> str:
        nonce = 0
        while True:
            await asyncio.sleep(self._options.silence_s / 4)
            silent_s = time.monotonic() - self._last_message_s
            if silent_s >= self._options.silence_s:
                return f"no message for {silent_s:.1f} s"
            nonce += 1
            self._send(worker_pb2.ConnectRequest(ping=worker_pb2.Ping(nonce=nonce)))


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is gone. What it raised is logged; a cancellation of the caller is its own."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended with an error", task.get_name(), exc_info=error)
