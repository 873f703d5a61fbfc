"""Asks one worker directly, past the router, as a router would: for benchmarks."""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import grpc
from switchyard.v1 import generation_pb2, worker_pb2, worker_pb2_grpc

from kvstore.network.channels import dial


class Part(enum.Enum):
    """What the worker is to do."""

    WHOLE = worker_pb2.REQUEST_ROLE_MIXED
    PREFILL = worker_pb2.REQUEST_ROLE_PREFILL
    DECODE = worker_pb2.REQUEST_ROLE_DECODE


@dataclass(frozen=True, slots=True)
class TimedToken:
    """A token and when it came, on time.perf_counter()."""

    token_id: int
    came_s: float


class DirectWorker:
    """One connection to one worker. Requests are greedy and ignore the end of text."""

    def __init__(self, stub: worker_pb2_grpc.WorkerServiceStub) -> None:
        self._stub = stub
        self._outbox: queue.SimpleQueue[worker_pb2.ConnectRequest | None] = queue.SimpleQueue()
        served = stub.GetLoad(worker_pb2.GetLoadRequest()).worker.served
        hello = worker_pb2.RouterHello(router_id=f"bench-{time.monotonic_ns()}", epoch=1, served=served)
        self._outbox.put(worker_pb2.ConnectRequest(hello=hello))
        self._stream = stub.Connect(iter(self._outbox.get, None))
        self._tokens: dict[str, queue.SimpleQueue[TimedToken | None]] = defaultdict(queue.SimpleQueue)
        self._finished: dict[str, worker_pb2.RequestFinished] = {}
        self._changed = threading.Condition()
        self._is_over = False
        self._count = 0
        threading.Thread(target=self._read, daemon=True).start()

    def ttft_s(self, token_ids: Sequence[int]) -> float:
        """Seconds from submit to the first token of a request for one."""
        self._count += 1
        name = f"direct-{self._count}"
        sent_s = time.perf_counter()
        self.submit(name, token_ids, Part.WHOLE, max_tokens=1)
        first = self.next_token(name)
        self.wait_finished(name)
        return first.came_s - sent_s

    def submit(self, name: str, token_ids: Sequence[int], part: Part, max_tokens: int) -> None:
        """Begin a request."""
        sampling = generation_pb2.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)
        submit = worker_pb2.Submit(
            stream_id=name,
            epoch=1,
            role=part.value,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
        )
        self._outbox.put(worker_pb2.ConnectRequest(submit=submit))

    def let_continue(self, name: str, token_ids: Sequence[int]) -> None:
        """The prefill side of a DECODE part is through."""
        message = worker_pb2.Continue(stream_id=name, token_ids=token_ids)
        self._outbox.put(worker_pb2.ConnectRequest(**{"continue": message}))

    def cancel(self, name: str) -> None:
        """End a request."""
        self._outbox.put(worker_pb2.ConnectRequest(cancel=worker_pb2.Cancel(stream_id=name)))

    def next_token(self, name: str) -> TimedToken:
        """The request's next token. Raises RuntimeError when it ends without one."""
        tokens = self._tokens[name]
        # Who began to wait after the connection broke gets no other signal.
        token = None if self._is_over and tokens.empty() else tokens.get()
        if token is None:
            why = self._finished[name].error if name in self._finished else "the worker closed the connection"
            raise RuntimeError(f"the worker sent no token: {why}")
        return token

    def wait_finished(self, name: str) -> worker_pb2.RequestFinished:
        """How the request ended. Raises RuntimeError when the worker went away."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._finished or self._is_over)
            if name not in self._finished:
                raise RuntimeError("the worker closed the connection")
            return self._finished[name]

    def load(self) -> worker_pb2.WorkerLoad:
        """The worker's counters now."""
        answer: worker_pb2.GetLoadResponse = self._stub.GetLoad(worker_pb2.GetLoadRequest())
        return answer.load

    def close(self) -> None:
        """End the connection."""
        self._outbox.put(None)

    def _read(self) -> None:
        with suppress(grpc.RpcError):
            for message in self._stream:
                self._take(message, time.perf_counter())
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for tokens in list(self._tokens.values()):
            tokens.put(None)

    def _take(self, message: worker_pb2.ConnectResponse, now_s: float) -> None:
        kind = message.WhichOneof("message")
        if kind == "tokens":
            batch = message.tokens
            for index, token_id in zip(batch.stream_index, batch.token_ids, strict=True):
                self._tokens[batch.stream_ids[index]].put(TimedToken(token_id, now_s))
        elif kind == "finished":
            with self._changed:
                self._finished[message.finished.stream_id] = message.finished
                self._changed.notify_all()
            self._tokens[message.finished.stream_id].put(None)


@contextmanager
def connect(address: str) -> Iterator[DirectWorker]:
    """A connection to the worker at HOST:PORT."""
    with dial(address, ()) as channel:
        worker = DirectWorker(worker_pb2_grpc.WorkerServiceStub(channel))
        try:
            yield worker
        finally:
            worker.close()
