"""A router's side of WorkerService.Connect, as plain as can be: what a test submits, and what came back."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import grpc
from switchyard.v1 import generation_pb2, worker_pb2, worker_pb2_grpc


class WorkerClient:
    """One connection to one worker; a context manager."""

    def __init__(self, address: str, router_id: str = "test-router", epoch: int = 1) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._outbox: queue.SimpleQueue[worker_pb2.ConnectRequest | None] = queue.SimpleQueue()
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[str, worker_pb2.RequestFinished] = {}
        served = self._stub.GetLoad(worker_pb2.GetLoadRequest()).worker.served
        self.send(hello=worker_pb2.RouterHello(router_id=router_id, epoch=epoch, served=served))
        self._stream = self._stub.Connect(iter(self._outbox.get, None))
        self.hello: worker_pb2.WorkerHello = next(self._stream).hello
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._outbox.put(None)
        self._stream.cancel()
        self._channel.close()

    def _read(self) -> None:
        try:
            for message in self._stream:
                if message.WhichOneof("message") == "tokens":
                    batch = message.tokens
                    for index, position, token_id in zip(
                        batch.stream_index, batch.positions, batch.token_ids, strict=True
                    ):
                        self.tokens[batch.stream_ids[index]].append(token_id)
                        assert position >= 0
                elif message.WhichOneof("message") == "finished":
                    self.finished[message.finished.stream_id] = message.finished
        except grpc.RpcError:
            pass  # the test is over, or the worker was killed

    def send(self, **message: object) -> None:
        """One ConnectRequest."""
        self._outbox.put(worker_pb2.ConnectRequest(**message))

    def submit(self, stream_id: str, token_ids: list[int], role: int, max_tokens: int = 8, **options: object) -> None:
        """A greedy request that ignores the end of text."""
        sampling = generation_pb2.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=1)
        options = {"num_prompt_tokens": len(token_ids), "sampling": sampling, "epoch": 1, **options}
        self.send(submit=worker_pb2.Submit(stream_id=stream_id, role=role, token_ids=token_ids, **options))

    def continue_stream(self, stream_id: str, token_ids: list[int]) -> None:
        """The prefill side is through."""
        self.send(**{"continue": worker_pb2.Continue(stream_id=stream_id, token_ids=token_ids)})

    def wait_finished(self, stream_id: str, timeout_s: float = 60.0) -> worker_pb2.RequestFinished:
        """Block until the request ended."""
        wait_until(lambda: stream_id in self.finished, timeout_s)
        return self.finished[stream_id]

    def kv_fingerprint(self) -> bytes:
        """What the worker's block names begin with."""
        return self._stub.GetLoad(worker_pb2.GetLoadRequest()).worker.kv_fingerprint

    def load(self) -> worker_pb2.WorkerLoad:
        """The worker's counters now."""
        return self._stub.GetLoad(worker_pb2.GetLoadRequest()).load


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll; raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)


def disaggregate(
    prefill: WorkerClient, decode: WorkerClient, token_ids: list[int], max_tokens: int = 8
) -> tuple[list[int], worker_pb2.RequestFinished, worker_pb2.RequestFinished]:
    """One request as the router runs it: (tokens, how it ended at prefill, how it ended at decode)."""
    stream_id = f"s{time.monotonic_ns()}"
    decode.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_DECODE, max_tokens)
    prefill.submit(stream_id, token_ids, worker_pb2.REQUEST_ROLE_PREFILL, max_tokens)
    prefilled = prefill.wait_finished(stream_id)
    first = prefill.tokens[stream_id]
    decode.continue_stream(stream_id, first)
    decoded = decode.wait_finished(stream_id)
    return first + decode.tokens[stream_id], prefilled, decoded
