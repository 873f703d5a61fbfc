"""A gRPC client of one or several routers, for programs and for the command line: token streams as plain events.

A stream whose router dies is resumed by itself, at the next router or at the same one when it is back; the caller sees
one unbroken stream. Knows the GenerationService contract; knows nothing of what is behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType

import grpc

from switchyard_client._channels import channel_options, dial, dial_async
from switchyard_client._errors import error_of
from switchyard_client._messages import embed_message, event_of, many_message, served_adapter
from switchyard_client._resuming import ResumingStream
from switchyard_client._stubs import generation_pb2, generation_pb2_grpc
from switchyard_client._types import Embedding, Event, GenerationRequest, ServedAdapter, ServedModel

Target = str | Sequence[str]


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
        self._options = channel_options(router_silence_s)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._targets = [target] if isinstance(target, str) else list(target)
        self._resume_within_s = resume_within_s
        self._channels: dict[str, grpc.Channel] = {}
        self._aio_channels: dict[str, grpc.aio.Channel] = {}

    def generate(self, request: GenerationRequest) -> Iterator[Event]:
        """Started, then Tokens, then Finished. Raises GenerationError. Closing the iterator cancels the stream."""
        stream = ResumingStream(request, self._targets, self._resume_within_s, self._metadata)
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
        stream = ResumingStream(request, self._targets, self._resume_within_s, self._metadata)
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

    def generate_many(
        self, requests: Sequence[GenerationRequest], n: int = 1, best_of: int | None = None
    ) -> Iterator[tuple[int, Event]]:
        """The events of n choices of each request, each with the request's index times n plus the choice's.

        best_of: choices to generate, of which the n with the greatest mean logprob come, when all have ended; n if left
        out. Choice i has the request's seed plus i. The shortest deadline counts for all. Raises GenerationError, also
        when the router is lost: what has come of each stream says where to resume it.
        """
        message = many_message(requests, n, best_of)
        deadline_s = min((one.deadline_s for one in requests if one.deadline_s is not None), default=None)
        call = self._stub().GenerateMany(message, timeout=deadline_s, metadata=self._metadata)
        try:
            for part in call:
                if (event := event_of(part.response)) is not None:
                    yield part.index, event
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            call.cancel()

    def tokenize(self, text: str, model: str = "") -> Sequence[int]:
        """Ids of a text. Raises GenerationError."""
        try:
            message = generation_pb2.TokenizeRequest(model=model, text=text)
            return tuple(self._stub().Tokenize(message, metadata=self._metadata).ids)
        except grpc.RpcError as error:
            raise error_of(error) from None

    def embed(
        self,
        prompt: str | Sequence[int],
        pooling: str = "last",
        is_raw: bool = False,
        model: str = "",
        deadline_s: float | None = None,
    ) -> Embedding:
        """The embedding of a text or of token ids. Raises GenerationError.

        pooling: "last" or "mean", of the hidden states after the final norm. is_raw: not scaled to length 1.
        """
        try:
            message = embed_message(prompt, pooling, is_raw, model)
            answer = self._stub().Embed(message, timeout=deadline_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None
        return Embedding(
            tuple(answer.values), answer.num_prompt_tokens, answer.num_cached_prompt_tokens, answer.worker_id
        )

    def models(self) -> Sequence[ServedModel]:
        """What is served. Raises GenerationError."""
        try:
            answer = self._stub().ListModels(generation_pb2.ListModelsRequest(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None
        return tuple(
            ServedModel(model.name, model.context_tokens, model.vocab_size, model.parent, model.root)
            for model in answer.models
        )

    def load_adapter(self, name: str, path: str, load_inplace: bool = False, pin: bool = False) -> ServedAdapter:
        """Serve the LoRA adapter of a directory under a name, which requests then give as `model`.

        path: as the cluster sees it, below the directory that it loads adapters from. load_inplace: instead of the one
        that has the name. pin: it stays on devices while nobody uses it. Raises GenerationError.
        """
        message = generation_pb2.LoadAdapterRequest(name=name, path=path, load_inplace=load_inplace, pin=pin)
        try:
            answer = self._stub().LoadAdapter(message, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None
        return served_adapter(answer.adapter)

    def unload_adapter(self, name: str) -> None:
        """Serve an adapter no longer; streams that run go on. Raises GenerationError."""
        try:
            self._stub().UnloadAdapter(generation_pb2.UnloadAdapterRequest(name=name), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None

    def adapters(self) -> Sequence[ServedAdapter]:
        """The adapters that are served, by name. Raises GenerationError."""
        try:
            answer = self._stub().ListAdapters(generation_pb2.ListAdaptersRequest(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None
        return tuple(map(served_adapter, answer.adapters))

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
