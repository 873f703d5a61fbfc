"""The client against real sockets, and what it makes of messages."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import switchyard_client
from switchyard.v1 import generation_pb2, generation_pb2_grpc
from switchyard_client import (
    FinishReason,
    GenerationClient,
    GenerationError,
    GenerationRequest,
    RequestStats,
    SamplingParams,
    ServedModel,
    Tokens,
)
from switchyard_client._messages import event_of, request_message

from router.service.text import TextCodec
from tests.router.api.asking import PROMPT, request
from tests.router.conftest import MODEL, pair, running_cluster
from tests.router.fake_worker import CONTEXT_TOKENS, VOCAB_SIZE, expected_tokens


def test_the_package_has_its_public_names_and_no_others() -> None:
    public = {name for name in vars(switchyard_client) if not name.startswith("_")}
    assert public == set(switchyard_client.__all__)


async def test_a_plain_synchronous_client_streams(model_dir: Path) -> None:
    async with running_cluster(model_dir, *pair()) as cluster:

        def call() -> list[int]:
            with GenerationClient(cluster.grpc_address) as client:
                assert client.models() == (ServedModel(MODEL, CONTEXT_TOKENS, VOCAB_SIZE),)
                assert client.tokenize("def") == tuple(TextCodec(model_dir / "tokenizer.json").encode("def", True))
                return [i for event in client.generate(request()) if isinstance(event, Tokens) for i in event.ids]

        assert await asyncio.to_thread(call) == expected_tokens(PROMPT, 20)


@pytest.mark.parametrize(
    ("mine", "message"),
    [(SamplingParams, generation_pb2.SamplingParams), (RequestStats, generation_pb2.RequestStats)],
)
def test_types_have_the_fields_of_their_messages(mine: type, message: type) -> None:
    assert [field.name for field in dataclasses.fields(mine)] == list(message.DESCRIPTOR.fields_by_name)


def test_what_is_left_open_is_not_sent() -> None:
    assert request_message(GenerationRequest("x")) == generation_pb2.GenerateRequest(
        text="x", sampling=generation_pb2.SamplingParams()
    )
    whole = SamplingParams(0.0, 0.5, 0, 3, 7, ("a", "b"), (1, 2), True)
    sent = request_message(GenerationRequest([5, 6], whole, model="m"))
    assert sent.sampling == generation_pb2.SamplingParams(**dataclasses.asdict(whole))
    assert (list(sent.token_ids.ids), sent.model) == ([5, 6], "m")


@pytest.mark.parametrize("order", [GenerationRequest((-1,)), GenerationRequest("x", SamplingParams(seed=2**64))])
def test_a_number_that_its_field_cannot_carry_is_refused(order: GenerationRequest) -> None:
    with pytest.raises(GenerationError, match="INVALID_ARGUMENT"), GenerationClient("127.0.0.1:1") as client:
        next(client.generate(order))


def test_a_newer_routers_events_are_passed_over_and_its_reasons_named() -> None:
    assert event_of(generation_pb2.GenerateResponse(stream_id="s")) is None
    finished = generation_pb2.GenerateResponse(finished=generation_pb2.Finished(reason=9))
    with pytest.raises(GenerationError, match="UNIMPLEMENTED: finish reason 9"):
        event_of(finished)
    assert {reason.value for reason in FinishReason} == {
        name.removeprefix("FINISH_REASON_").lower() for name in generation_pb2.FinishReason.keys()[1:]
    }


def test_an_address_where_nobody_is_fails_with_the_status() -> None:
    with GenerationClient("127.0.0.1:1", resume_within_s=0) as client:
        with pytest.raises(GenerationError) as caught:
            next(client.generate(GenerationRequest("x")))
        assert caught.value.status == "UNAVAILABLE"
        with pytest.raises(GenerationError, match="UNAVAILABLE"):
            client.models()


class Credentials(generation_pb2_grpc.GenerationServiceServicer):
    """Answers nothing, and keeps what callers say of themselves."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def _note(self, context: grpc.aio.ServicerContext) -> None:
        self.seen.append(dict(context.invocation_metadata()).get("authorization", ""))

    async def Tokenize(self, request: object, context: grpc.aio.ServicerContext) -> generation_pb2.TokenizeResponse:
        self._note(context)
        return generation_pb2.TokenizeResponse()

    async def ListModels(self, request: object, context: grpc.aio.ServicerContext) -> generation_pb2.ListModelsResponse:
        self._note(context)
        return generation_pb2.ListModelsResponse()

    async def Generate(
        self, request: object, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        self._note(context)
        finished = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP)
        yield generation_pb2.GenerateResponse(finished=finished)


@asynccontextmanager
async def serving(servicer: Credentials) -> AsyncIterator[str]:
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_the_key_goes_with_each_call() -> None:
    servicer = Credentials()
    async with serving(servicer) as address:

        def call() -> None:
            with GenerationClient(address, api_key="k") as client:
                client.models()
                client.tokenize("x")
                list(client.generate(GenerationRequest("x")))

        await asyncio.to_thread(call)
    assert servicer.seen == ["Bearer k"] * 3
