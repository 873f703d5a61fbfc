"""Streams through the loss of workers: nothing lost, nothing doubled, nothing out of order, and an end in any case."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from switchyard.v1 import worker_pb2
from switchyard_client import GenerationError

from router import events
from router.sampling import SamplingParams
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import MODEL, config_with, pair, running_cluster, until
from tests.router.fake_worker import FakeWorker, expected_tokens

NUM_TOKENS = 6


@pytest.mark.parametrize("die_after", range(1, NUM_TOKENS - 1))  # of its own; the first comes from the prefill worker
async def test_a_decode_worker_that_dies_after_any_token_is_replaced(model_dir: Path, die_after: int) -> None:
    shared: set[tuple[int, ...]] = set()
    prefill, first = pair(0, shared)
    first.die_after = die_after
    first.step_s = 0.002
    second = FakeWorker("decode-1", "decode", shared)
    async with running_cluster(model_dir, prefill, first) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=NUM_TOKENS)))
        await cluster.loses(first)
        await cluster.add(second)
        _, ids, _, finished = await answer
    assert ids == expected_tokens(PROMPT, NUM_TOKENS)
    assert finished.stats.num_replacements == 1
    assert finished.stats.decode_worker_id == "decode-1"
    resumed = second.submits[0]
    assert resumed.num_prompt_tokens == len(PROMPT)
    assert list(resumed.token_ids) == [*PROMPT, *ids[: len(resumed.token_ids) - len(PROMPT)]]


@pytest.mark.parametrize("die_after", range(1, NUM_TOKENS))
async def test_a_mixed_worker_that_dies_after_any_token_is_replaced(model_dir: Path, die_after: int) -> None:
    workers = [FakeWorker(f"mixed-{i}", "mixed") for i in range(2)]
    for worker in workers:
        worker.step_s = 0.002
    async with running_cluster(model_dir, *workers) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=NUM_TOKENS)))
        await until(lambda: any(worker.submits for worker in workers), "it was placed")
        chosen = next(worker for worker in workers if worker.submits)
        chosen.die_after = die_after
        _, ids, _, _ = await answer
    assert ids == expected_tokens(PROMPT, NUM_TOKENS)


async def test_a_prefill_worker_that_dies_leaves_the_prompt_to_the_decode_worker(model_dir: Path) -> None:
    prefill, decode = pair()
    prefill.prefill_s = 60.0
    async with running_cluster(model_dir, prefill, decode) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request()))
        await until(lambda: decode.num_live == 1 and prefill.num_live == 1, "both were given their part")
        await prefill.kill()
        _, ids, _, finished = await answer
    assert ids == expected_tokens(PROMPT, 20)
    assert finished.stats.num_replacements == 0
    assert finished.stats.num_recomputed_prompt_tokens == len(PROMPT)


async def test_a_prefill_worker_that_fails_leaves_the_prompt_to_the_decode_worker(model_dir: Path) -> None:
    prefill, decode = pair()
    prefill.refuse_with = worker_pb2.RequestFinished(outcome=worker_pb2.REQUEST_OUTCOME_FAILED, error="no memory")
    async with running_cluster(model_dir, prefill, decode) as cluster:
        _, ids, _, _ = await collect(cluster.grpc_address, request())
    assert ids == expected_tokens(PROMPT, 20)


async def test_both_workers_die_and_come_back_as_others(model_dir: Path) -> None:
    prefill, decode = pair()
    decode.step_s = 0.005
    async with running_cluster(model_dir, prefill, decode) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=50)))
        await until(lambda: decode.num_sent >= 5, "some tokens came")
        await asyncio.gather(prefill.kill(), decode.kill())
        await cluster.add(*pair(1))
        _, ids, _, finished = await answer
    assert ids == expected_tokens(PROMPT, 50)
    assert finished.stats.decode_worker_id == "decode-1"


async def test_the_same_worker_comes_back_after_a_broken_connection(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.005
    async with running_cluster(model_dir, worker) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=50)))
        await until(lambda: worker.num_sent >= 5, "some tokens came")
        await worker.kill()
        await worker.start()
        _, ids, _, finished = await answer
    assert ids == expected_tokens(PROMPT, 50)
    assert finished.stats.num_replacements == 1
    assert worker.num_connections == 2


async def test_no_worker_comes_back_in_time(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.005
    async with running_cluster(model_dir, worker, config=config_with(replacement_wait_s=0.1)) as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=50)))
        await until(lambda: worker.num_sent >= 5, "some tokens came")
        await worker.kill()
        with pytest.raises(GenerationError, match="UNAVAILABLE: no worker is up"):
            await answer


async def test_placed_anew_only_so_often(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.refuse_with = worker_pb2.RequestFinished(outcome=worker_pb2.REQUEST_OUTCOME_FAILED, error="on fire")
    async with running_cluster(model_dir, worker, config=config_with(max_replacements=2)) as cluster:
        with pytest.raises(GenerationError, match=r"UNAVAILABLE: placed 3 times.*on fire"):
            await collect(cluster.grpc_address, request())
    assert len(worker.submits) == 3


async def test_a_failed_step_moves_the_stream_once(model_dir: Path) -> None:
    bad, good = FakeWorker("mixed-0", "mixed"), FakeWorker("mixed-1", "mixed")
    failed = worker_pb2.RequestFinished(outcome=worker_pb2.REQUEST_OUTCOME_STEP_FAILED, error="MemoryError: none left")
    bad.refuse_with = failed
    good.load.num_queued_tokens = 1_000_000  # so the bad one is asked first
    async with running_cluster(model_dir, bad, good) as cluster:
        await until(lambda: "mixed-1" in cluster.router._dispatcher.loads, "its load came")
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
        assert (len(bad.submits), len(good.submits)) == (1, 1)
        good.refuse_with = failed
        where = "a step with the request failed on mixed-0 and on mixed-1: MemoryError: none left"
        with pytest.raises(GenerationError, match=f"INTERNAL: {where}"):
            await collect(cluster.grpc_address, request())
        assert (len(bad.submits), len(good.submits)) == (2, 2)
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        async with httpx.AsyncClient(base_url=cluster.http_url, transport=httpx.AsyncHTTPTransport()) as client:
            answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == where
        assert answer.json()["error"]["code"] == "step_failed"


async def test_a_failed_worker_is_avoided_and_an_invalid_request_is_not_tried_twice(model_dir: Path) -> None:
    bad, good = FakeWorker("mixed-0", "mixed"), FakeWorker("mixed-1", "mixed")
    bad.refuse_with = worker_pb2.RequestFinished(outcome=worker_pb2.REQUEST_OUTCOME_FAILED, error="on fire")
    good.load.num_queued_tokens = 1_000_000  # so the bad one is asked first
    async with running_cluster(model_dir, bad, good) as cluster:
        await until(lambda: "mixed-1" in cluster.router._dispatcher.loads, "its load came")
        assert (await collect(cluster.grpc_address, request()))[1] == expected_tokens(PROMPT, 20)
        assert (len(bad.submits), len(good.submits)) == (1, 1)
        for worker in (bad, good):
            worker.refuse_with = worker_pb2.RequestFinished(
                outcome=worker_pb2.REQUEST_OUTCOME_FAILED, error="prompt: too long here", is_invalid_request=True
            )
        num_before = len(bad.submits) + len(good.submits)
        with pytest.raises(GenerationError, match="INVALID_ARGUMENT: prompt: too long here"):
            await collect(cluster.grpc_address, request())
        assert len(bad.submits) + len(good.submits) == num_before + 1


@pytest.mark.parametrize("offset", [1, 5])
async def test_a_gap_in_the_positions_moves_the_stream(model_dir: Path, offset: int) -> None:
    broken, good = FakeWorker("mixed-0", "mixed"), FakeWorker("mixed-1", "mixed")
    broken.bend = [0, 0, offset]
    good.bend = [0, 0, offset]
    async with running_cluster(model_dir, broken, good) as cluster:
        _, ids, _, finished = await collect(cluster.grpc_address, request())
    assert ids == expected_tokens(PROMPT, 20)
    assert finished.stats.num_replacements == 2  # each worker bends once


async def test_a_doubled_token_is_dropped_and_the_gap_it_leaves_moves_the_stream(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.bend = [0, 0, -1]
    async with running_cluster(model_dir, worker) as cluster:
        _, ids, _, _ = await collect(cluster.grpc_address, request())
    assert ids == expected_tokens(PROMPT, 20)


async def test_a_silent_worker_is_lost(model_dir: Path) -> None:
    silent, good = FakeWorker("mixed-0", "mixed"), FakeWorker("mixed-1", "mixed")
    async with running_cluster(model_dir, silent, config=config_with(worker_silence_s=0.3)) as cluster:
        silent.step_s = 0.01
        answer = asyncio.create_task(collect(cluster.grpc_address, request(max_tokens=40)))
        await until(lambda: silent.num_sent >= 5, "some tokens came")
        silent.is_mute = True
        await cluster.add(good)
        _, ids, _, finished = await answer
    assert ids == expected_tokens(PROMPT, 40)
    assert finished.stats.decode_worker_id == "mixed-1"


@pytest.mark.parametrize("hang_after", [0, 3])
@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_a_worker_that_lives_and_brings_nothing_is_given_up(model_dir: Path, who: str, hang_after: int) -> None:
    shared: set[tuple[int, ...]] = set()
    prefill, decode = pair(0, shared)
    {"prefill": prefill, "decode": decode}[who].hang_after = hang_after
    config = config_with(first_token_wait_s=1.0, next_token_wait_s=1.0, max_replacements=10)
    async with running_cluster(model_dir, prefill, decode, *pair(1, shared), config=config) as cluster:
        answers = [collect(cluster.grpc_address, request((*PROMPT, i), max_tokens=20)) for i in range(1, 4)]
        for i, (_, ids, _, _) in enumerate(await asyncio.gather(*answers), start=1):
            assert ids == expected_tokens((*PROMPT, i), 20)


async def test_a_slow_reader_stops_only_itself(model_dir: Path) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    async with running_cluster(model_dir, worker) as cluster:
        order = events.GenerationRequest((*PROMPT, 1), SamplingParams(temperature=0.0, max_tokens=1000))
        stream = cluster.router._generation.stream(order)
        await anext(stream)
        await until(lambda: worker.num_sent == 64, "the window is full")
        _, ids, _, _ = await collect(cluster.grpc_address, request(max_tokens=500))
        assert ids == expected_tokens(PROMPT, 500)
        assert worker.num_sent == 64 + 500
        taken = [*(await anext(stream)).ids, *(await anext(stream)).ids]
        assert taken == expected_tokens((*PROMPT, 1), len(taken))
        await until(lambda: worker.num_sent > 64 + 500, "the window was widened")
        await stream.aclose()
