"""The gRPC API over real sockets, with fake workers behind it."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from switchyard.v1 import generation_pb2, generation_pb2_grpc, worker_pb2
from switchyard_client import (
    FinishReason,
    GenerationError,
    GenerationRequest,
    SamplingParams,
)

from router.model_files import ModelFiles
from router.service.text import TextCodec
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import MODEL, config_with, pair, running_cluster, until
from tests.router.fake_worker import CONTEXT_TOKENS, VOCAB_SIZE, FakeWorker, expected_tokens


async def test_prefill_and_decode_workers_share_a_stream(model_dir: Path) -> None:
    prefill, decode = pair()
    async with running_cluster(model_dir, prefill, decode) as cluster:
        started, ids, text, finished = await collect(cluster.grpc_address, request(seed=7))
    assert ids == expected_tokens(PROMPT, 20)
    assert text == TextCodec(model_dir / "tokenizer.json").decode(ids)
    assert (started.model, started.num_prompt_tokens, started.seed) == (MODEL, len(PROMPT), 7)
    assert finished.reason is FinishReason.LENGTH
    stats = finished.stats
    assert (stats.prefill_worker_id, stats.decode_worker_id) == ("prefill-0", "decode-0")
    assert (stats.num_computed_prompt_tokens, stats.num_recomputed_prompt_tokens) == (len(PROMPT), 0)
    assert (stats.num_transferred_blocks, stats.num_replacements) == (3, 0)
    assert 0 < stats.ttft_s <= stats.duration_s
    assert [submit.role for submit in prefill.submits + decode.submits] == [
        worker_pb2.REQUEST_ROLE_PREFILL,
        worker_pb2.REQUEST_ROLE_DECODE,
    ]


@pytest.mark.parametrize("role", ["mixed", "decode"])
async def test_a_worker_alone_takes_whole_requests(model_dir: Path, role: str) -> None:
    worker = FakeWorker("alone", role)
    async with running_cluster(model_dir, worker) as cluster:
        _, ids, _, finished = await collect(cluster.grpc_address, request())
    assert ids == expected_tokens(PROMPT, 20)
    assert worker.submits[0].role == worker_pb2.REQUEST_ROLE_MIXED
    assert finished.stats.prefill_worker_id == finished.stats.decode_worker_id == "alone"


async def test_a_prefill_pool_alone_is_not_enough(model_dir: Path) -> None:
    worker = FakeWorker("prefill-0", "prefill")
    async with running_cluster(model_dir, worker, config=config_with(new_request_wait_s=0.1)) as cluster:
        with pytest.raises(GenerationError, match="only prefill workers are up") as caught:
            await collect(cluster.grpc_address, request())
    assert caught.value.status == "UNAVAILABLE"
    assert caught.value.retry_after_s is not None


async def test_a_request_that_comes_before_its_worker_waits_for_it(model_dir: Path) -> None:
    async with running_cluster(model_dir) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request()))
        await until(lambda: len(cluster.router._dispatcher.waiting) == 1, "the request waits")
        await cluster.add(FakeWorker("late", "mixed"))
        assert (await answer)[1] == expected_tokens(PROMPT, 20)


@pytest.mark.parametrize("is_disaggregated", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 2])
async def test_short_streams_end_once(model_dir: Path, is_disaggregated: bool, max_tokens: int) -> None:
    workers = pair() if is_disaggregated else (FakeWorker("mixed-0", "mixed"),)
    async with running_cluster(model_dir, *workers) as cluster:
        _, ids, _, finished = await collect(cluster.grpc_address, request(max_tokens=max_tokens))
    assert ids == expected_tokens(PROMPT, max_tokens)
    assert finished.reason is FinishReason.LENGTH
    assert finished.stats.num_computed_prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("stop_at", [0, 1, 5])
async def test_a_stop_token_ends_the_stream_and_is_not_shown(model_dir: Path, stop_at: int) -> None:
    prefill, decode = pair()
    prefill.stop_at = decode.stop_at = stop_at
    async with running_cluster(model_dir, prefill, decode) as cluster:
        _, ids, _, finished = await collect(cluster.grpc_address, request())
    assert ids == expected_tokens(PROMPT, stop_at)
    assert finished.reason is FinishReason.STOP


async def test_a_stop_text_ends_the_stream_before_it_is_shown(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    codec = TextCodec(model_dir / "tokenizer.json")
    whole = codec.decode(expected_tokens(PROMPT, 200))
    stop = whole[60:70]
    async with running_cluster(model_dir, worker) as cluster:
        _, ids, text, finished = await collect(cluster.grpc_address, request(max_tokens=200, stop=(stop,)))
        await until(lambda: worker.num_live == 0, "the worker got the cancel")
    assert text == whole[: whole.index(stop)]
    assert finished.reason is FinishReason.STOP
    assert len(ids) < 200
    assert ids == expected_tokens(PROMPT, len(ids))
    assert len(worker.cancels) == 1


async def test_text_prompts_are_encoded_and_max_tokens_ends_at_the_context(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    prompt = "def f(x):\n    return x\n" * 150
    ids = TextCodec(model_dir / "tokenizer.json").encode(prompt, add_special_tokens=True)
    async with running_cluster(model_dir, worker) as cluster:
        started, output, _, _ = await collect(cluster.grpc_address, request(prompt, max_tokens=None))
    assert started.num_prompt_tokens == len(ids)
    assert output == expected_tokens(ids, CONTEXT_TOKENS - len(ids))


async def test_a_cancelled_call_stops_its_workers(model_dir: Path) -> None:
    prefill, decode = pair()
    decode.step_s = 0.005
    async with running_cluster(model_dir, prefill, decode) as cluster:
        stub = cluster.stub()
        message = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT))
        call = stub.Generate(message)
        async for answer in call:
            if answer.WhichOneof("event") == "tokens":
                break
        call.cancel()
        cancelled_s = time.monotonic()
        await until(lambda: decode.num_live == 0, "the decode worker got the cancel")
        assert time.monotonic() - cancelled_s < 1.0  # the contract: a second
        assert decode.cancels == [decode.submits[0].stream_id]


async def test_a_cancel_while_prefilling_reaches_both_workers(model_dir: Path) -> None:
    prefill, decode = pair()
    prefill.prefill_s = 60.0
    async with running_cluster(model_dir, prefill, decode) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request()))
        await until(lambda: decode.num_live == 1 and prefill.num_live == 1, "both were given their part")
        answer.cancel()
        await until(lambda: decode.num_live == 0 and prefill.num_live == 0, "both got the cancel")


async def test_a_deadline_ends_the_stream_everywhere(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.01
    async with running_cluster(model_dir, worker) as cluster:
        order = GenerationRequest(PROMPT, SamplingParams(max_tokens=2000), deadline_s=0.2)
        with pytest.raises(GenerationError, match="DEADLINE_EXCEEDED"):
            await collect(cluster.grpc_address, order)
        await until(lambda: worker.num_live == 0, "the worker got the cancel")
    assert 0 < worker.submits[0].deadline_s < 1.3


async def test_the_routers_own_deadline_bounds_every_request(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.prefill_s = 60.0
    async with running_cluster(model_dir, worker, config=config_with(request_timeout_s=0.1)) as cluster:
        with pytest.raises(GenerationError, match="deadline exceeded while decoding"):
            await collect(cluster.grpc_address, request())


BAD_REQUESTS = [
    (request(""), "INVALID_ARGUMENT", "prompt"),
    (request(()), "INVALID_ARGUMENT", "prompt"),
    (request((1, 2, VOCAB_SIZE)), "INVALID_ARGUMENT", "prompt: id 4096 at index 2"),
    (request(tuple([1] * CONTEXT_TOKENS)), "INVALID_ARGUMENT", "prompt: has 2048 tokens"),
    (request("word " * 20_000), "INVALID_ARGUMENT", "prompt"),
    (request("x" * 5_000_000), "RESOURCE_EXHAUSTED", "prompt"),
    (request(max_tokens=0), "INVALID_ARGUMENT", "max_tokens"),
    (request(max_tokens=-5), "INVALID_ARGUMENT", "max_tokens"),
    (request(temperature=-0.1), "INVALID_ARGUMENT", "temperature"),
    (request(temperature=math.nan), "INVALID_ARGUMENT", "temperature"),
    (request(temperature=math.inf), "INVALID_ARGUMENT", "temperature"),
    (request(top_p=0.0), "INVALID_ARGUMENT", "top_p"),
    (request(top_p=1.5), "INVALID_ARGUMENT", "top_p"),
    (request(stop=("",)), "INVALID_ARGUMENT", "stop"),
    (request(stop=tuple("abcdefghijklmnopq")), "INVALID_ARGUMENT", "stop"),
    (request(stop_token_ids=(VOCAB_SIZE,)), "INVALID_ARGUMENT", "stop_token_ids"),
    (request(logprobs=10_000), "INVALID_ARGUMENT", "logprobs"),
    (request(min_p=-0.1), "INVALID_ARGUMENT", "min_p"),
    (request(typical_p=math.nan), "INVALID_ARGUMENT", "typical_p"),
    (request(repetition_penalty=0.0), "INVALID_ARGUMENT", "repetition_penalty"),
    (request(presence_penalty=2.1), "INVALID_ARGUMENT", "presence_penalty"),
    (request(frequency_penalty=math.inf), "INVALID_ARGUMENT", "frequency_penalty"),
    (request(logit_bias={5: math.nan}), "INVALID_ARGUMENT", "logit_bias"),
    (request(logit_bias={VOCAB_SIZE: 1.0}), "INVALID_ARGUMENT", "logit_bias"),
    (request(logit_bias=dict.fromkeys(range(1025), 1.0)), "INVALID_ARGUMENT", "logit_bias"),
    (request(max_tokens=5, min_tokens=6), "INVALID_ARGUMENT", "min_tokens"),
    (request(bad_words=("x",) * 129), "INVALID_ARGUMENT", "bad_words"),
    (request(allowed_token_ids=(7,), banned_token_ids=(7,)), "INVALID_ARGUMENT", "allowed_token_ids"),
    (request(banned_sequences=((),)), "INVALID_ARGUMENT", "banned_sequences"),
    (replace(request(), cache_salt=b"x" * 1025), "INVALID_ARGUMENT", "cache_salt"),
    (GenerationRequest(PROMPT, model="nobody"), "NOT_FOUND", "model"),
]


async def test_bad_requests_are_refused_by_name(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        for order, status, field in BAD_REQUESTS:
            with pytest.raises(GenerationError) as caught:
                await collect(cluster.grpc_address, order)
            assert caught.value.status == status, field
            assert caught.value.message.startswith(field)
            assert "\n" not in caught.value.message
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
    assert len(worker.submits) == 1


async def test_messages_that_say_nothing_known_are_refused_by_name(model_dir: Path) -> None:
    sampling, text = generation_pb2.SamplingParams(max_tokens=3, grammar=generation_pb2.Grammar()), "a"
    plain = generation_pb2.GenerateRequest(text=text)
    async with (
        running_cluster(model_dir, FakeWorker("mixed-0", "mixed")) as cluster,
        grpc.aio.insecure_channel(cluster.grpc_address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for call, field in (
            (stub.Generate(generation_pb2.GenerateRequest(text=text, sampling=sampling)).read(), "grammar"),
            (stub.GenerateMany(generation_pb2.GenerateManyRequest(requests=[plain] * 129)).read(), "requests"),
            (stub.Embed(generation_pb2.EmbedRequest(text=text, pooling=77)), "pooling"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: ") as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_invalid_utf8_and_oversized_messages_leave_the_server_up(model_dir: Path) -> None:
    async with running_cluster(model_dir, FakeWorker("mixed-0", "mixed")) as cluster:
        async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
            raw = channel.unary_stream("/switchyard.v1.GenerationService/Generate")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(b"\x12\x02\xff\xfe").read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "UTF-8" in (caught.value.details() or "")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(b"\x12" + b"x" * (20 * 2**20)).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)


async def test_too_many_requests_are_refused_with_a_time_to_return(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.prefill_s = 60.0
    async with running_cluster(model_dir, worker, config=config_with(max_inflight_requests=1)) as cluster:
        first = asyncio.create_task(collect(cluster.grpc_address, request()))
        await until(lambda: worker.num_live == 1, "the first is in")
        with pytest.raises(GenerationError, match="RESOURCE_EXHAUSTED") as caught:
            await collect(cluster.grpc_address, request())
        assert caught.value.retry_after_s is not None
        first.cancel()


async def test_tokenize_and_list_models(model_dir: Path) -> None:
    async with running_cluster(model_dir, FakeWorker("mixed-0", "mixed")) as cluster:
        stub = cluster.stub()
        tokens = await stub.Tokenize(generation_pb2.TokenizeRequest(text="def f(x):"))
        assert list(tokens.ids) == TextCodec(model_dir / "tokenizer.json").encode("def f(x):", True)
        models = (await stub.ListModels(generation_pb2.ListModelsRequest())).models
        assert [(m.name, m.context_tokens, m.vocab_size) for m in models] == [(MODEL, CONTEXT_TOKENS, VOCAB_SIZE)]
        with pytest.raises(grpc.aio.AioRpcError, match="text"):
            await stub.Tokenize(generation_pb2.TokenizeRequest(text=""))


async def test_health_follows_the_workers(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    async with running_cluster(model_dir) as cluster, grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await cluster.add(worker)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await worker.kill()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_reflection_names_our_service(model_dir: Path) -> None:
    async with running_cluster(model_dir) as cluster, grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert {"switchyard.v1.GenerationService", "grpc.health.v1.Health"} <= names


async def test_a_hundred_streams_at_once(model_dir: Path) -> None:
    shared: set[tuple[int, ...]] = set()
    async with running_cluster(model_dir, *pair(0, shared), *pair(1, shared)) as cluster:
        orders = [request((100 + i, *PROMPT), max_tokens=10 + i % 7) for i in range(100)]
        answers = await asyncio.gather(*(collect(cluster.grpc_address, order) for order in orders))
        for order, (_, ids, _, _) in zip(orders, answers, strict=True):
            assert ids == expected_tokens(order.prompt, order.sampling.max_tokens or 0)
        assert all(worker.submits for worker in cluster.workers)


def test_model_files_are_what_the_apis_announce(model_dir: Path) -> None:
    files = ModelFiles.load(model_dir, MODEL)
    assert (files.context_tokens, files.vocab_size) == (CONTEXT_TOKENS, VOCAB_SIZE)
