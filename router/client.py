"""A gRPC client of a router, for programs and for the command line: token streams as plain events.

Knows the GenerationService contract; knows nothing of what is behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import grpc
from switchyard.v1 import generation_pb2, generation_pb2_grpc

from router.events import Event, GenerationRequest
from router.wire import event_of, sampling_message

_OPTIONS = [("grpc.max_receive_message_length", 64 * 2**20), ("grpc.max_send_message_length", 64 * 2**20)]


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
    """Streams completions from the router at `target` ("HOST:PORT"). The channel opens at the first call."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._channel: grpc.Channel | None = None
        self._aio_channel: grpc.aio.Channel | None = None

    def generate(self, request: GenerationRequest) -> Iterator[Event]:
        """Started, then Tokens, then Finished. Raises GenerationError. Closing the iterator cancels the stream."""
        call = self._stub().Generate(_message(request), timeout=request.deadline_s)
        try:
            for message in call:
                yield event_of(message)
        except grpc.RpcError as error:
            raise _error(error) from None
        finally:
            call.cancel()

    async def generate_async(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """As generate, in an event loop."""
        call = self._aio_stub().Generate(_message(request), timeout=request.deadline_s)
        try:
            async for message in call:
                yield event_of(message)
        except grpc.aio.AioRpcError as error:
            raise _error(error) from None
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
        """Close the channel of the synchronous calls."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def aclose(self) -> None:
        """Close both channels."""
        self.close()
        if self._aio_channel is not None:
            await self._aio_channel.close()
            self._aio_channel = None

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

    def _stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        if self._channel is None:
            self._channel = grpc.insecure_channel(self._target, options=_OPTIONS)
        return generation_pb2_grpc.GenerationServiceStub(self._channel)

    def _aio_stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        if self._aio_channel is None:
            self._aio_channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        return generation_pb2_grpc.GenerationServiceStub(self._aio_channel)


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
    # aio's Metadata looks like a mapping but iterates over pairs: dict() would stumble.
    trailers = {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416
    retry_after = trailers.get("retry-after-s")
    return GenerationError(error.code().name, error.details() or "", float(retry_after) if retry_after else None)
