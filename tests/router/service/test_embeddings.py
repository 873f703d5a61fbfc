"""Embeddings over HTTP, with fake workers: what a request waits for, and what becomes of it when workers fail."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from switchyard.v1 import worker_pb2

from tests.router.conftest import MODEL, until
from tests.router.fake_worker import FakeWorker
from tests.router.http_calls import served

BODY = {"model": MODEL, "input": [5, 6, 7], "normalize": False}
VECTOR = [0.5, -2.0, 3.0]


def embedder(name: str) -> FakeWorker:
    worker = FakeWorker(name, "mixed")
    worker.refuse_with = worker_pb2.RequestFinished(
        outcome=worker_pb2.REQUEST_OUTCOME_PREFILLED, embedding=VECTOR, num_computed_prompt_tokens=3
    )
    return worker


async def test_one_that_comes_before_its_worker_waits_for_it(model_dir: Path) -> None:
    async with served(model_dir) as (cluster, client):
        dispatcher = cluster.router._dispatcher
        answer = asyncio.create_task(client.post("/v1/embeddings", json=BODY))
        await until(lambda: len(dispatcher.waiting) == 1, "the request waits")
        await cluster.add(embedder("late"))
        assert (await answer).json()["data"][0]["embedding"] == VECTOR
        assert not dispatcher.waiting


async def test_it_waits_without_polling_and_no_longer_than_it_may(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(model_dir, new_request_wait_s=0.3) as (cluster, client):
        fleet, picks = cluster.router._dispatcher.fleet, []
        pick = fleet.pick
        monkeypatch.setattr(fleet, "pick", lambda *args: picks.append(time.monotonic()) or pick(*args))
        answer = await client.post("/v1/embeddings", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    assert len(picks) == 2
    assert 0.3 <= picks[1] - picks[0] < 5.0


async def test_another_worker_is_asked_where_one_fails(model_dir: Path) -> None:
    broken, whole = FakeWorker("mixed-0", "mixed"), embedder("mixed-1")
    broken.refuse_with = worker_pb2.RequestFinished(outcome=worker_pb2.REQUEST_OUTCOME_FAILED, error="no memory")
    async with served(model_dir, broken, max_replacements=1000) as (cluster, client):
        answer = asyncio.create_task(client.post("/v1/embeddings", json=BODY))
        await until(lambda: len(broken.submits) >= 2, "it is asked again while there is no other")
        await cluster.add(whole)
        assert (await answer).json()["data"][0]["embedding"] == VECTOR
        assert len(whole.submits) == 1
