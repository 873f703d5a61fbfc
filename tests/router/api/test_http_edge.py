"""The edge of the HTTP API: what is counted, named, compressed, and accepted because it asks for nothing."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.resources.chat.completions import Completions as Chats
from openai.resources.completions import Completions

from router.api.openai.options import NOT_SERVED
from router.api.openai.schema import ChatRequest, CompletionRequest
from router.config import RouterConfig
from tests.router.conftest import MODEL
from tests.router.fake_worker import CONTEXT_TOKENS, FakeWorker
from tests.router.http_calls import BASE, served

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


async def outcomes(client: httpx.AsyncClient) -> dict[str, float]:
    """Requests counted so far."""
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("switchyard_requests_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


async def test_each_refusal_is_counted_once(model_dir: Path) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed"), max_message_bytes=100_000) as (_, client):
        post = client.post
        for refused, outcome, status in (
            (post("/v1/completions", json={**BASE, "model": "nobody"}), "model_not_found", 404),
            (post("/v1/completions", json={**BASE, "colour": "red"}), "invalid_request", 400),
            (post("/v1/completions", content=b"{"), "invalid_request", 400),
            (post("/v1/completions", content=b"x" * 200_000), "prompt_too_large", 413),
            (post("/v1/completions", json={**BASE, "prompt": [1] * CONTEXT_TOKENS}), "context_length_exceeded", 400),
            (post("/v1/completions", json={**BASE, "prompt": [[1], [-1]]}), "invalid_request", 400),
            (post("/v1/completions", content=b"{}", headers={"content-encoding": "br"}), "unsupported_encoding", 415),
            (post("/v1/chat/completions", json={**CHAT, "messages": [1]}), "invalid_request", 400),
            (post("/v1/chat/completions", json={**CHAT, "top_p": 7}), "invalid_request", 400),
            (post("/v1/nothing", json=BASE), "unknown_route", 404),
            (client.get("/v1/completions"), "unknown_route", 405),
            (client.get("/v1/models/nobody"), "model_not_found", 404),
        ):
            before = await outcomes(client)
            response = await refused
            after = await outcomes(client)
            assert response.status_code == status
            assert response.json()["error"]["code"] == outcome
            assert response.json()["error"]["type"] == "invalid_request_error"
            assert {**before, outcome: before.get(outcome, 0) + 1} == after
        await post("/v1/completions", json=BASE)
        assert (await outcomes(client))["length"] == 1


async def test_a_prompt_beyond_the_context_has_openais_code(model_dir: Path) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        completion = await client.post("/v1/completions", json={**BASE, "prompt": [1] * (CONTEXT_TOKENS + 5)})
        long = [{"role": "user", "content": "word " * 20_000}]
        chat = await client.post("/v1/chat/completions", json={**CHAT, "messages": long, "stream": True})
    for answer, param in ((completion, "prompt"), (chat, "messages")):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert error["message"].startswith(f"{param}: has ")
        assert f"This model's maximum context length is {CONTEXT_TOKENS} tokens" in error["message"]
    assert f"{CONTEXT_TOKENS + 5} tokens" in completion.json()["error"]["message"]


async def test_every_answer_has_a_request_id(model_dir: Path) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        mine = {"x-request-id": "order-66 (again)"}
        for call in (
            client.post("/v1/completions", json=BASE, headers=mine),
            client.post("/v1/completions", json={**BASE, "stream": True}, headers=mine),
            client.post("/v1/completions", content=b"{", headers=mine),
            client.get("/nothing", headers=mine),
            client.get("/healthz", headers=mine),
        ):
            assert (await call).headers["x-request-id"] == "order-66 (again)"
        made = {(await client.get("/healthz")).headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        for bad in ("x" * 129, "", "caf\u00e9".encode()):
            answer = await client.get("/healthz", headers={"x-request-id": bad})
            assert len(answer.headers["x-request-id"]) == 32


async def test_a_failure_that_nobody_foresaw_is_counted_and_named_too(model_dir: Path) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (cluster, _):

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        cluster.router._generation.preparation.check_model = broken  # type: ignore[method-assign]
        transport = httpx.AsyncHTTPTransport()
        async with httpx.AsyncClient(base_url=cluster.http_url, transport=transport) as client:
            answer = await client.post("/v1/completions", json=BASE)
            assert answer.status_code == 500
            assert len(answer.headers["x-request-id"]) == 32
            assert {name: count for name, count in (await outcomes(client)).items() if count} == {"internal_error": 1}


async def test_web_pages_of_named_origins_may_call(model_dir: Path) -> None:
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        assert (await client.options("/v1/completions", headers=asks)).status_code == 405
        plain = await client.post("/v1/completions", json=BASE, headers=asks)
        assert "access-control-allow-origin" not in plain.headers
    async with served(model_dir, FakeWorker("mixed-0", "mixed"), cors_origins=("https://app.example",)) as (_, client):
        before = await client.options("/v1/completions", headers=asks)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, "https://app.example")
        for call in (
            client.post("/v1/completions", json=BASE, headers=asks),
            client.post("/v1/completions", content=b"{", headers=asks),
        ):
            answer = await call
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            assert answer.headers["access-control-expose-headers"] == "X-Request-Id"
            assert answer.headers["x-request-id"]
        other = await client.post("/v1/completions", json=BASE, headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/path", "", "https://"])
def test_an_origin_that_is_none_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match=r"^cors_origins: must be SCHEME://HOST\[:PORT\] or \*, not"):
        RouterConfig(cors_origins=(origin,))


async def test_compressed_bodies(model_dir: Path) -> None:
    data = json.dumps(BASE).encode()
    raw = zlib.compressobj(wbits=-15)
    async with served(model_dir, FakeWorker("mixed-0", "mixed"), max_message_bytes=50_000) as (_, client):

        async def post(content: bytes, encoding: str) -> httpx.Response:
            return await client.post("/v1/completions", content=content, headers={"content-encoding": encoding})

        plain = await post(data, "identity")
        for content, encoding in (
            (gzip.compress(data), "gzip"),
            (gzip.compress(data), "X-GZIP, identity"),
            (gzip.compress(data[:5]) + gzip.compress(data[5:]), "gzip"),
            (zlib.compress(data), "deflate"),
            (raw.compress(data) + raw.flush(), "deflate"),
        ):
            assert (await post(content, encoding)).json()["choices"] == plain.json()["choices"]
        bomb = gzip.compress(b" " * 30_000_000)
        assert len(bomb) < 50_000
        for content, encoding, status in (
            (bomb, "gzip", 413),
            (data, "br", 415),
            (gzip.compress(gzip.compress(data)), "gzip, gzip", 415),
            (data, "gzip", 400),
            (gzip.compress(data)[:-9], "gzip", 400),
            (gzip.compress(data) + b"x", "gzip", 400),
            (gzip.compress(data), "identity", 400),
            (b"", "gzip", 400),
        ):
            assert (await post(content, encoding)).status_code == status, (encoding, status)


async def test_health_has_two_names(model_dir: Path) -> None:
    async with served(model_dir) as (_, client):
        assert (await client.get("/health")).text == (await client.get("/healthz")).text == "ok\n"


NEUTRAL = [
    {"top_k": -1},
    {"top_k": 5.0, "seed": 1.0, "n": 1.0, "max_tokens": 3.0},
    {"logprobs": None, "n": None, "stop": None, "seed": None, "temperature": None, "top_p": None, "top_k": None},
    {"ignore_eos": None, "stop_token_ids": None, "return_token_ids": None},
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
]
NEUTRAL_CHATS = [
    {"prediction": {"type": "content", "content": "x"}},
    {"prediction": None, "modalities": ["text"], "audio": None, "web_search_options": None, "reasoning_effort": None},
    {"verbosity": "medium", "functions": [], "function_call": "auto", "tools": [], "tool_choice": "none"},
    {"metadata": {"a": "b"}, "store": True, "prompt_cache_retention": "24h", "parallel_tool_calls": True},
    {"max_completion_tokens": 3.0, "logprobs": False, "top_logprobs": 0, "chat_template_kwargs": None},
]


async def test_what_asks_for_nothing_is_accepted(model_dir: Path) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        for change in NEUTRAL:
            answer = await client.post("/v1/completions", json={**BASE, "max_tokens": 3, **change})
            assert answer.status_code == 200, answer.text
        for change in (*NEUTRAL, *NEUTRAL_CHATS):
            answer = await client.post("/v1/chat/completions", json={**CHAT, **change})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"reasoning_effort": "high"},
        {"verbosity": "low"},
        {"functions": [{"name": "f"}]},
        {"moderation": {}},
        {"max_tokens": 2.5},
        {"chat_template_kwargs": [1]},
        {"chat_template_kwargs": {"messages": []}},
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(model_dir: Path, change: dict[str, Any]) -> None:
    (name,) = change
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        answer = await client.post("/v1/chat/completions", json={**CHAT, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize(("create", "kind"), [(Chats.create, ChatRequest), (Completions.create, CompletionRequest)])
def test_every_parameter_of_the_openai_client_is_known(create: Any, kind: Any) -> None:
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert set(inspect.signature(create).parameters) - transport <= set(kind.model_fields) | set(NOT_SERVED)


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        ("hello", "messages"),
        ([], "messages"),
        ([{"role": "user", "content": "a"}, "b"], "messages.1"),
        ([{"content": "a"}], "messages.0.role"),
        ([{"role": 1, "content": "a"}], "messages.0.role"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": {"type": "text"}}], "messages.0.content"),
        ([{"role": "user", "content": ["a"]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content.0.type"),
    ],
)
async def test_malformed_messages_are_refused_by_path(model_dir: Path, messages: object, path: str) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (_, client):
        answer = await client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, path)
    assert error["message"].startswith(f"{path}: ")


async def test_any_role_and_field_reaches_the_template(model_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    template = "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{% endfor %}{{ mood }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    messages = [{"role": "narrator", "content": "x", "name": "Ann", "anything": {"a": [1]}}]
    worker = FakeWorker("mixed-0", "mixed")
    async with served(tmp_path, worker) as (cluster, client):
        body = {**CHAT, "messages": messages, "chat_template_kwargs": {"mood": "calm"}}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        codec = cluster.router._generation.codec
    assert codec.decode(list(worker.submits[0].token_ids)) == json.dumps(messages[0], sort_keys=True) + "calm"


async def test_a_body_that_is_too_large_is_refused_by_its_header(model_dir: Path) -> None:
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (cluster, _):
        for expecting in ("", "Expect: 100-continue\r\n"):
            reader, writer = await asyncio.open_connection(*cluster.http_url.removeprefix("http://").split(":"))
            length = f"Content-Length: {10**12}\r\n"
            writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: h\r\n{length}{expecting}\r\n".encode())
            async with asyncio.timeout(5):
                assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
                answer = await reader.readuntil(b"}}")
            assert b'"code":"prompt_too_large"' in answer
            writer.close()


async def test_connections_without_a_request_are_closed(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.api.http_api._HEADER_S", 1.5)
    async with served(model_dir, FakeWorker("mixed-0", "mixed")) as (cluster, _):
        address = cluster.http_url.removeprefix("http://").split(":")
        silent, half, used = [await asyncio.open_connection(*address) for _ in range(3)]
        half[1].write(b"GET /healthz HTTP/1.1\r\nHost")
        reader, writer = used
        for _ in range(8):  # more than the bound, but each request has its own
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await reader.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.5)
        async with asyncio.timeout(5):
            assert await silent[0].read() == b""
            assert await half[0].read() == b""
