"""WorkerService without an engine: a worker bounds what routers may give it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from switchyard.v1 import generation_pb2
from switchyard.v1 import worker_pb2 as pb

from workers.engine.engine import StepEvents
from workers.engine.loop import LoopEvents, Submit
from workers.engine.request import FinishReason, RequestEnd
from workers.server import servicer
from workers.server.servicer import Connection, WorkerServicer


class Engine:
    """Takes commands and does nothing."""

    def __init__(self) -> None:
        self.posted: list[Any] = []

    def post(self, command: object) -> None:
        self.posted.append(command)


def submit(number: int) -> pb.Submit:
    sampling = generation_pb2.SamplingParams(max_tokens=4, seed=1)
    return pb.Submit(
        stream_id=f"s{number}",
        epoch=1,
        role=pb.REQUEST_ROLE_MIXED,
        token_ids=[1, 2],
        num_prompt_tokens=2,
        sampling=sampling,
    )


async def test_more_requests_than_the_bound_are_refused_for_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "MAX_REQUESTS", 2)
    serving, engine = WorkerServicer(pb.WorkerHello(worker_id="w"), pb.WorkerLoad, time.monotonic), Engine()
    serving.attach(engine, None)
    connection = Connection("r", 1)
    for number in range(3):
        await serving._submit(submit(number), connection)
    assert [type(command) for command in engine.posted] == [Submit, Submit]
    refused = (await connection.outbox.get()).finished
    assert (refused.stream_id, refused.outcome) == ("s2", pb.REQUEST_OUTCOME_FAILED)
    assert not refused.is_invalid_request, "another worker may take it"
    assert refused.error == "this worker has 2 requests already"


async def test_a_failed_step_is_told_from_other_failures() -> None:
    serving, engine = WorkerServicer(pb.WorkerHello(worker_id="w"), pb.WorkerLoad, time.monotonic), Engine()
    serving.attach(engine, None)
    connection = Connection("r", 1)
    await serving._submit(submit(0), connection)
    (command,) = engine.posted
    end = RequestEnd(
        command.request.request_id, 1, FinishReason.STEP_FAILED, *[0] * 8, 0.0, None, None, None, "MemoryError: x"
    )
    serving._dispatch(LoopEvents(StepEvents(ended=[end])))
    finished = (await connection.outbox.get()).finished
    assert (finished.stream_id, finished.outcome) == ("s0", pb.REQUEST_OUTCOME_STEP_FAILED)
    assert (finished.error, finished.is_invalid_request) == ("MemoryError: x", False)
