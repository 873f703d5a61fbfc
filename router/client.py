"""A gRPC client of one or several routers, for programs and for the command line: token streams as plain events.

A stream whose router dies is resumed by itself, at the next router or at the same one when it is back; the caller sees
one unbroken stream. Knows the GenerationService contract; knows nothing of what is behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from switchyard.v1 import generation_pb2, generation_pb2_grpc

from kvstore.network.channels import dial, dial_async
from router.events import Event, Finished, GenerationRequest, Started, Tokens
from router.sampling import sampling_message
from router.wire import event_of

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    # A router that died is back on its port within seconds: do not wait longer than that to see it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),  # a long prefill brings no data, and is probed as often
]
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 1.0

Target = str | Sequence[str]


class GenerationError(Exception):
    """The router refused or failed a call."""

    def __init__(self, status: str, message: str, retry_after_s: float | None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status  # name of the gRPC status, such as "INVALID_ARGUMENT"
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the router serves."""

    name: str
    context_tokens: int
    vocab_size: int


class GenerationClient:
    """Streams completions from the routers at `target` ("HOST:PORT", or several of them). Connects at the first call.

    resume_within_s: how long a stream that lost its router is tried for; 0 means that it fails at once. A new one is
    tried for five seconds of it, so that a router may restart meanwhile.
    router_silence_s: a router that does not even answer a probe for so long is lost.
    api_key: sent with each call; callers with different keys share no KV blocks, and a stream is its own caller's.
    """

    def __init__(
        self, target: Target, resume_within_s: float = 60.0, api_key: str = "", router_silence_s: float = 15.0
    ) -> None:
        # A router that hangs says nothing, and its host answers for it: only probes of our own show that.
        probe_ms, answer_ms = max(1, int(router_silence_s * 1000 / 3)), max(1, int(router_silence_s * 1000 * 2 / 3))
        self._options = [
            *_OPTIONS,
            ("grpc.keepalive_time_ms", probe_ms),
            ("grpc.keepalive_timeout_ms", answer_ms),
            ("grpc.http2.ping_timeout_ms", answer_ms),  # without it a minute, whatever keepalive says
        ]
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._targets = [target] if isinstance(target, str) else list(target)
        self._resume_within_s = resume_within_s
        self._channels: dict[str, grpc.Channel] = {}
        self._aio_channels: dict[str, grpc.aio.Channel] = {}

    def generate(self, request: GenerationRequest) -> Iterator[Event]:
        """Started, then Tokens, then Finished. Raises GenerationError. Closing the iterator cancels the stream."""
        stream = _ResumingStream(request, self._targets, self._resume_within_s, self._metadata)
        while not stream.is_finished:
            call = stream.call(self._stub(stream.target))
            try:
                for message in call:
                    if (event := stream.take(message)) is not None:
                        yield event
            except grpc.RpcError as error:
                time.sleep(stream.pause_after(error))
            finally:
                call.cancel()

    async def generate_async(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """As generate, in an event loop."""
        stream = _ResumingStream(request, self._targets, self._resume_within_s, self._metadata)
        while not stream.is_finished:
            call = stream.call(self._aio_stub(stream.target))
            try:
                async for message in call:
                    if (event := stream.take(message)) is not None:
                        yield event
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(stream.pause_after(error))
            finally:
                call.cancel()

    def tokenize(self, text: str, model: str = "") -> Sequence[int]:
        """Ids of a text. Raises GenerationError."""
        try:
            return tuple(self._stub().Tokenize(generation_pb2.TokenizeRequest(model=model, text=text)).ids)
        except grpc.RpcError as error:
            raise _error(error) from None

    def models(self) -> Sequence[ServedModel]:
        """What is served. Raises GenerationError."""
        try:
            answer = self._stub().ListModels(generation_pb2.ListModelsRequest())
        except grpc.RpcError as error:
            raise _error(error) from None
        return tuple(ServedModel(model.name, model.context_tokens, model.vocab_size) for model in answer.models)

    def close(self) -> None:
        """Close the channels of the synchronous calls."""
        while self._channels:
            self._channels.popitem()[1].close()

    async def aclose(self) -> None:
        """Close all channels."""
        self.close()
        while self._aio_channels:
            await self._aio_channels.popitem()[1].close()

    def __enter__(self) -> GenerationClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> GenerationClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def _stub(self, target: str = "") -> generation_pb2_grpc.GenerationServiceStub:
        target = target or self._targets[0]
        if target not in self._channels:
            self._channels[target] = dial(target, self._options)
        return generation_pb2_grpc.GenerationServiceStub(self._channels[target])

    def _aio_stub(self, target: str) -> generation_pb2_grpc.GenerationServiceStub:
        if target not in self._aio_channels:
            self._aio_channels[target] = dial_async(target, self._options)
        return generation_pb2_grpc.GenerationServiceStub(self._aio_channels[target])


class _ResumingStream:
    """One stream as its client knows it, across routers: which call comes next, and what of it is new."""

    def __init__(
        self,
        request: GenerationRequest,
        targets: Sequence[str],
        resume_within_s: float,
        metadata: Sequence[tuple[str, str]],
    ) -> None:
        self._request = _message(request)
        self._metadata = metadata
        self._targets = targets
        self._resume_within_s = resume_within_s
        self._deadline_s = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        self._known = generation_pb2.ResumeRequest()
        self._num_losses = 0
        self._lost_s: float | None = None  # since when no router carries it
        self._pause_s = _FIRST_PAUSE_S
        self.is_finished = False

    @property
    def target(self) -> str:
        """The router to ask next."""
        return self._targets[self._num_losses % len(self._targets)]

    def call(self, stub: generation_pb2_grpc.GenerationServiceStub) -> Any:
        """Begin the stream, or go on with it."""
        left_s = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        if self._known.stream_id:
            return stub.Resume(self._known, timeout=left_s, metadata=self._metadata)
        return stub.Generate(self._request, timeout=left_s, metadata=self._metadata)

    def take(self, message: generation_pb2.GenerateResponse) -> Event | None:
        """The event of a message; None when the caller has had it."""
        event = event_of(message)
        self._lost_s, self._pause_s = None, _FIRST_PAUSE_S
        if isinstance(event, Started):
            is_new = not self._known.stream_id
            self._known.stream_id = event.stream_id
            return event if is_new else None
        if isinstance(event, Tokens):
            self._known.token_ids.ids.extend(event.ids)
            self._known.num_tokens += len(event.ids)
            self._known.has_rest = not event.ids and bool(event.text)
        self.is_finished = isinstance(event, Finished)
        return event

    def pause_after(self, error: grpc.RpcError) -> float:
        """How long to wait before the next call. Raises GenerationError when there is to be none."""
        trailers = _trailers(error)
        # A router that says why it failed a stream has made up its mind, unless it is only going down itself. One that
        # goes down without a word cancels what it still carries.
        is_router_lost = error.code() in _LOST and trailers.get("switchyard-error") in _NOT_MEANT
        now_s = time.monotonic()
        if self._lost_s is None:
            self._lost_s = now_s
        self._num_losses += 1
        lost_for_s = now_s - self._lost_s
        if self._known.stream_id:
            may_go_on = lost_for_s < self._resume_within_s
        else:  # nobody has seen anything of it: it can be asked for again, of each router at least once
            begin_within_s = min(_BEGIN_WITHIN_S, self._resume_within_s)
            may_go_on = self._num_losses < len(self._targets) or lost_for_s < begin_within_s
        if not (is_router_lost and may_go_on):
            raise _error(error) from None
        pause_s, self._pause_s = self._pause_s, min(_LAST_PAUSE_S, 2 * self._pause_s)
        return pause_s


_BEGIN_WITHIN_S = 5.0  # a router that restarts is back sooner; an address where nobody is should say so soon
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_NOT_MEANT = (None, "stopping", "journal_away")  # None: no router said anything


def _message(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    try:
        message = generation_pb2.GenerateRequest(model=request.model, sampling=sampling_message(request.sampling))
        if isinstance(request.prompt, str):
            message.text = request.prompt
        else:
            message.token_ids.CopyFrom(generation_pb2.TokenIds(ids=request.prompt))
    except ValueError as error:  # a number that its field cannot carry
        raise GenerationError("INVALID_ARGUMENT", str(error), None) from None
    return message


def _error(error: grpc.RpcError) -> GenerationError:
    retry_after = _trailers(error).get("retry-after-s")
    return GenerationError(error.code().name, error.details() or "", float(retry_after) if retry_after else None)


def _trailers(error: grpc.RpcError) -> dict[str, str]:
    # aio's Metadata looks like a mapping but iterates over pairs: dict() would stumble.
    return {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416
