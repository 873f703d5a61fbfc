"""Asks one worker directly, past the router: the other half of "what does the router add"."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from switchyard.v1 import generation_pb2, worker_pb2, worker_pb2_grpc


class DirectWorker:
    """One connection to one worker, one request at a time."""

    def __init__(self, stub: worker_pb2_grpc.WorkerServiceStub) -> None:
        self._outbox: queue.SimpleQueue[worker_pb2.ConnectRequest | None] = queue.SimpleQueue()
        hello = worker_pb2.RouterHello(router_id=f"bench-{time.monotonic_ns()}", epoch=1)
        self._outbox.put(worker_pb2.ConnectRequest(hello=hello))
        self._stream = stub.Connect(iter(self._outbox.get, None))
        self._count = 0

    def ttft_s(self, token_ids: tuple[int, ...]) -> float:
        """Seconds from submit to the first token of a greedy request."""
        self._count += 1
        stream_id = f"direct-{self._count}"
        sampling = generation_pb2.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
        submit = worker_pb2.Submit(
            stream_id=stream_id,
            epoch=1,
            role=worker_pb2.REQUEST_ROLE_MIXED,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
        )
        first_s = None
        sent_s = time.perf_counter()
        self._outbox.put(worker_pb2.ConnectRequest(submit=submit))
        for message in self._stream:
            kind = message.WhichOneof("message")
            if kind == "tokens" and first_s is None:
                first_s = time.perf_counter()
            if kind == "finished" and message.finished.stream_id == stream_id:
                if first_s is None:
                    raise RuntimeError(f"the worker sent no token: {message.finished.error}")
                return first_s - sent_s
        raise RuntimeError("the worker closed the connection")

    def close(self) -> None:
        """End the connection."""
        self._outbox.put(None)


@contextmanager
def connect(address: str) -> Iterator[DirectWorker]:
    """A connection to the worker at HOST:PORT."""
    with grpc.insecure_channel(address) as channel:
        worker = DirectWorker(worker_pb2_grpc.WorkerServiceStub(channel))
        try:
            yield worker
        finally:
            worker.close()
