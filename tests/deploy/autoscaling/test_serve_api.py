"""Serve's REST API against a dashboard that answers oddly, late or not at all: one typed error says what was odd."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deploy.autoscaling.serve_api import RUNNING, STARTING, ServeApi, ServePool, ServeReplica, ServeState
from deploy.autoscaling.serve_api import ServeUnavailable as Unavailable

RIGHT: dict[str, Any] = {
    "controller_info": {"node_id": "head"},
    "applications": {
        "decode": {
            "status": "RUNNING",
            "message": "",
            "deployments": {
                "decode": {
                    "target_num_replicas": 2,
                    "replicas": [
                        {"replica_id": "a", "state": "RUNNING", "start_time_s": 1.5, "node_id": "n"},
                        {"replica_id": "b", "state": "PENDING_ALLOCATION", "start_time_s": 2, "node_id": None},
                    ],
                }
            },
        },
        "prefill": {"status": "DEPLOYING", "message": "", "deployments": {}},
    },
}
DECODE = ("applications", "decode", "deployments", "decode")


@contextmanager
def dashboard(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def sent(content: bytes, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def with_part(path: tuple[str | int, ...], value: object) -> bytes:
    """The right answer with another part; ... takes it away."""
    answer: Any = copy.deepcopy(RIGHT)
    branch = answer
    for part in path[:-1]:
        branch = branch[part]
    if value is ...:
        del branch[path[-1]]
    else:
        branch[path[-1]] = value
    return json.dumps(answer).encode()


def test_a_right_answer() -> None:
    with dashboard(sent(json.dumps(RIGHT).encode())) as url:
        found = ServeApi(url, ("decode", "prefill")).state()
    replicas = (ServeReplica("a", RUNNING, 1.5, "n"), ServeReplica("b", STARTING, 2.0, ""))
    assert found == ServeState({"decode": ServePool("RUNNING", "", 2, replicas)}, "head")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><title>Log in</title>", "the answer is not JSON, but begins b'<!DOCTYPE html>"),
        (b"\xff\xfe", "the answer is not JSON"),
        (b"[" * 100_000, "the answer is not JSON"),
        (b"[]", "the answer is [], not keys and values"),
        (b"", "applications is missing"),
        (b"{}", "applications is missing"),
        (b'{"applications": null}', "applications is null, not keys and values"),
        (b'{"applications": {}}', "Serve runs none of the pools decode, prefill"),
        (with_part(("applications", "decode"), "x"), 'applications.decode is "x", not keys and values'),
        (with_part(("applications", "decode", "status"), ...), "applications.decode.status is missing"),
        (with_part(("applications", "decode", "deployments"), ...), "applications.decode.deployments is missing"),
        (with_part(("applications", "decode", "deployments"), []), "applications.decode.deployments is [], not keys"),
        (with_part((*DECODE, "target_num_replicas"), ...), ".decode.target_num_replicas is missing"),
        (with_part((*DECODE, "target_num_replicas"), "2"), '.target_num_replicas is "2", not a number of workers'),
        (with_part((*DECODE, "target_num_replicas"), -1), ".target_num_replicas is -1, not a number of workers"),
        (with_part((*DECODE, "target_num_replicas"), True), ".target_num_replicas is true, not a number of workers"),
        (with_part((*DECODE, "replicas"), ...), ".decode.replicas is missing"),
        (with_part((*DECODE, "replicas"), {}), ".decode.replicas is {}, not a list"),
        (with_part((*DECODE, "replicas", 1), 7), ".decode.replicas.1 is 7, not keys and values"),
        (with_part((*DECODE, "replicas", 0, "replica_id"), None), ".replicas.0.replica_id is null, not a text"),
        (with_part((*DECODE, "replicas", 0, "state"), 3), ".replicas.0.state is 3, not a text"),
        (with_part((*DECODE, "replicas", 0, "start_time_s"), "now"), '.replicas.0.start_time_s is "now", not a time'),
        (with_part((*DECODE, "replicas", 0, "start_time_s"), float("nan")), ".start_time_s is NaN, not a time"),
        (with_part((*DECODE, "replicas", 0, "start_time_s"), 10**400), "not a time"),
        (with_part((*DECODE, "replicas", 0, "node_id"), [1]), ".replicas.0.node_id is [1], not a text"),
        (with_part(("controller_info",), "x"), 'controller_info is "x", not keys and values'),
    ],
)
def test_an_odd_answer_is_no_answer_and_says_what_is_odd(content: bytes, message: str) -> None:
    with dashboard(sent(content)) as url, pytest.raises(Unavailable, match=re.escape(message)):
        ServeApi(url, ("decode", "prefill")).state()


def test_a_refusal_and_a_page_in_place_of_an_answer_to_a_change() -> None:
    with dashboard(sent(b"no such\ndeployment", 404)) as url, pytest.raises(Unavailable, match="404 no such deploy"):
        ServeApi(url).set_replicas("decode", 2)
    with dashboard(sent(b"<html>")) as url, pytest.raises(Unavailable, match="not JSON"):
        ServeApi(url).set_replicas("decode", 2)


def test_a_dashboard_that_hangs_is_given_up() -> None:
    """Also one that sends a byte now and then; and when the autoscaler is to end, at once."""
    is_over = threading.Event()
    apis: list[ServeApi] = []

    def hang(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.wfile.flush()
        for api in apis:
            api.close()
        is_over.wait()

    with dashboard(hang) as url:
        with pytest.raises(Unavailable, match=r"no answer within 0\.2 s"):
            ServeApi(url, timeout_s=0.2).state()
        apis.append(ServeApi(url, timeout_s=1e6))
        for _ in range(2):  # the one under way, and a later one
            with pytest.raises(Unavailable, match="given up"):
                apis[0].state()
        is_over.set()
