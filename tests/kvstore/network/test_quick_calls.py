"""Calls over a plain socket: what is asked is answered, and whatever goes wrong is an OSError and no wrong answer."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from switchyard.v1 import kvnode_pb2

from kvstore.network.quick_calls import CallRefused, CallServer, QuickCalls, _connect

ECHO, FAIL, SLOW = 1, 2, 3
TIMEOUT_S = 5.0


def echo(message: bytes) -> kvnode_pb2.LookupRequest:
    return kvnode_pb2.LookupRequest.FromString(message)


def refuse(message: bytes) -> kvnode_pb2.LookupRequest:
    raise ValueError("keys: not like this")


def sleep(message: bytes) -> kvnode_pb2.LookupRequest:
    time.sleep(1.0)
    return echo(message)


@pytest.fixture(params=["unix:{folder}/calls", "127.0.0.1:0", "[::1]:0"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CallServer]:
    address = request.param.format(folder=tmp_path)
    server = CallServer(address, {ECHO: echo, FAIL: refuse, SLOW: sleep})
    yield server
    server.close()


def ask(calls: QuickCalls, *keys: bytes, kind: int = ECHO) -> list[bytes]:
    request = kvnode_pb2.LookupRequest(keys=keys)
    return list(calls.begin(kind, request, kvnode_pb2.LookupRequest.FromString).answer().keys)


@pytest.mark.parametrize("keys", [[], [b"one"], [bytes([i % 256]) * 100_000 for i in range(20)]])
def test_an_answer_is_the_one_to_its_request(server: CallServer, keys: list[bytes]) -> None:
    calls = QuickCalls(server.address, TIMEOUT_S)
    for _ in range(3):
        assert ask(calls, *keys) == keys
    calls.close()


def test_many_threads_at_once(server: CallServer) -> None:
    calls = QuickCalls(server.address, TIMEOUT_S)
    with ThreadPoolExecutor(8) as threads:
        asked = [[b"%d" % i, bytes(i)] for i in range(400)]
        assert list(threads.map(lambda keys: ask(calls, *keys), asked)) == asked
    calls.close()


@pytest.mark.parametrize(("kind", "why"), [(FAIL, "keys: not like this"), (77, "no call 77")])
def test_a_refusal_says_why_and_the_next_call_is_answered(server: CallServer, kind: int, why: str) -> None:
    calls = QuickCalls(server.address, TIMEOUT_S)
    with pytest.raises(CallRefused, match=why):
        ask(calls, b"x", kind=kind)
    assert ask(calls, b"y") == [b"y"]
    calls.close()


def test_a_late_answer_is_nobody_elses(server: CallServer) -> None:
    calls = QuickCalls(server.address, timeout_s=0.2)
    with pytest.raises(OSError, match="timed out"):
        ask(calls, b"slow", kind=SLOW)
    assert ask(calls, b"next") == [b"next"]
    calls.close()


def test_a_server_that_came_back_is_found(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/calls"
    first = CallServer(address, {ECHO: echo})
    calls = QuickCalls(address, TIMEOUT_S)
    assert ask(calls, b"1") == [b"1"]
    first.close()
    with pytest.raises(OSError):  # noqa: PT011 - no such file, or refused
        ask(calls, b"2")
    second = CallServer(address, {ECHO: echo})
    assert ask(calls, b"3") == [b"3"]
    second.close()
    calls.close()


@pytest.mark.parametrize("noise", [b"", b"\1", struct.pack("<BI", 1, 2**31), struct.pack("<BI", 1, 5) + b"ab"])
def test_what_is_no_request_ends_its_own_connection_only(server: CallServer, noise: bytes) -> None:
    with _connect(server.address) as stranger:
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(TIMEOUT_S)
        assert stranger.recv(1) == b""
    calls = QuickCalls(server.address, TIMEOUT_S)
    assert ask(calls, b"x") == [b"x"]
    calls.close()


def test_after_the_close_calls_fail_and_no_thread_stays(server: CallServer) -> None:
    calls = QuickCalls(server.address, TIMEOUT_S)
    ask(calls, b"x")
    calls.close()
    with pytest.raises(OSError, match="closed"):
        ask(calls, b"x")
    deadline_s = time.monotonic() + TIMEOUT_S
    while any(thread.name == "kv-call" for thread in threading.enumerate()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not any(thread.name == "kv-call" for thread in threading.enumerate())
