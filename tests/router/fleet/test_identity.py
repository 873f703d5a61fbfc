"""A router that was not told its weights takes over its workers', and mixes no two in one stream."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from switchyard_client import GenerationError

from checkpoint.identity import ServedModel, tokenizer_digest
from router.fleet.identity import ServedIdentity
from tests.router.api.asking import collect, request
from tests.router.conftest import MODEL, QUICK, running_cluster, until
from tests.router.fake_worker import FakeWorker

OPEN = ServedModel("c", "m", "", "t")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def of(weights: str) -> ServedModel:
    return dataclasses.replace(OPEN, weights=weights)


async def test_the_first_worker_says_which_weights_are_served() -> None:
    identity = ServedIdentity(OPEN, 30.0, Clock())
    assert not await identity.known(0.0)
    assert identity.join(of("one")) == ""
    assert await identity.known(0.0)
    assert identity.now == of("one")
    assert identity.join(of("two")) == "weights: two there, one here"
    assert identity.join(of("one")) == ""


async def test_other_weights_are_taken_over_when_the_first_have_been_gone_for_a_while() -> None:
    clock = Clock()
    identity = ServedIdentity(OPEN, 30.0, clock)
    assert identity.join(of("one")) == ""
    identity.leave()
    clock.now_s = 29.9
    assert identity.join(of("two")) == "weights: two there, one here"
    assert identity.join(of("one")) == ""  # it came back
    identity.leave()
    clock.now_s = 60.0
    assert identity.join(of("two")) == ""
    assert identity.now == of("two")


async def test_a_router_that_was_told_its_weights_takes_no_others() -> None:
    identity = ServedIdentity(of("one"), 0.0, Clock())
    assert await identity.known(0.0)
    assert identity.join(of("two")) == "weights: two there, one here"
    assert identity.join(dataclasses.replace(of("one"), tokenizer="x")) == "tokenizer: x there, t here"


def worker_with(model_dir: Path, worker_id: str, weights: str) -> FakeWorker:
    worker = FakeWorker(worker_id, "mixed")
    worker.served = ServedModel("", MODEL, weights, tokenizer_digest(model_dir)).message()
    return worker


async def test_a_request_waits_for_the_first_worker(model_dir: Path) -> None:
    async with running_cluster(model_dir, weights="") as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(), resume_within_s=0.0))
        await until(lambda: cluster.router._generation.admission.num_inflight == 1, "the request waits")
        await cluster.add(worker_with(model_dir, "a", "one"))
        assert (await answer)[3].stats.decode_worker_id == "a"


async def test_without_any_worker_a_request_is_refused_after_its_wait(model_dir: Path) -> None:
    config = dataclasses.replace(QUICK, new_request_wait_s=0.05)
    async with running_cluster(model_dir, config=config, weights="") as cluster:
        with pytest.raises(GenerationError, match="no worker has come since this router started"):
            await collect(cluster.grpc_address, request(), resume_within_s=0.0)


async def test_a_stream_does_not_go_on_with_other_weights(model_dir: Path) -> None:
    """Its worker dies and others come with an upgrade of the model: the stream fails, the next one is served."""
    old, new = worker_with(model_dir, "a", "one"), worker_with(model_dir, "b", "two")
    old.hang_after = 3  # tokens
    config = dataclasses.replace(QUICK, replacement_wait_s=0.5)
    async with running_cluster(model_dir, old, config=config, weights="") as cluster:
        answer = asyncio.create_task(collect(cluster.grpc_address, request(), resume_within_s=0.0))
        await until(lambda: old.num_live == 1, "the stream runs")
        await new.start()
        cluster.workers.append(new)
        cluster.lease(new)
        await until(lambda: bool(cluster.router.readiness().workers_refused), "the other weights are refused")
        await old.kill()
        with pytest.raises(GenerationError):
            await answer
        await until(lambda: cluster.router.readiness().is_ready, "the other weights are taken over")
        assert (await collect(cluster.grpc_address, request()))[3].stats.decode_worker_id == "b"
