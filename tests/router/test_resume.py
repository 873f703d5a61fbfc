"""Streams through the loss of their router: any other one goes on, and each position comes once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from switchyard.v1 import generation_pb2

from kvstore.connect import open_journal
from router.model_files import ModelFiles
from router.service.text import TextCodec
from tests.processes import RedisServer
from tests.router.api.asking import PROMPT
from tests.router.conftest import MODEL, Cluster, running_cluster, until
from tests.router.fake_worker import FakeWorker, expected_tokens

NUM_TOKENS = 12
TOKENS = expected_tokens(PROMPT, NUM_TOKENS)
MINE = (("authorization", "Bearer a key"),)


@asynccontextmanager
async def two_routers(
    model_dir: Path, journal_url: str, *workers: FakeWorker
) -> AsyncIterator[tuple[Cluster, Cluster]]:
    """Two clusters that share a journal; a worker of the second one is the twin of one of the first."""
    twins = [FakeWorker(f"{worker.worker_id}-twin", worker.role) for worker in workers]
    async with (
        running_cluster(model_dir, *workers, journal=open_journal(journal_url, "")) as first,
        running_cluster(model_dir, *twins, journal=open_journal(journal_url, "")) as second,
    ):
        yield first, second


@pytest.fixture
def journal_url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/streams.journal"


def message(**sampling: object) -> generation_pb2.GenerateRequest:
    options = {"max_tokens": NUM_TOKENS, "temperature": 0.0, **sampling}
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=PROMPT), sampling=generation_pb2.SamplingParams(**options)
    )


class Reader:
    """What one client has of one stream."""

    def __init__(self) -> None:
        self.stream_id = ""
        self.ids: list[int] = []
        self.text = ""
        self.has_rest = False
        self.finished: generation_pb2.Finished | None = None

    async def read(self, call: grpc.aio.UnaryStreamCall, up_to: int | None = None) -> None:
        """Take messages until there are so many tokens, or to the end; then hang up."""
        async for got in call:
            self.stream_id = self.stream_id or got.stream_id
            assert got.stream_id == self.stream_id
            if got.HasField("tokens"):
                assert got.tokens.first_position == len(self.ids)
                self.ids += got.tokens.ids
                self.text += got.tokens.text
                self.has_rest = not got.tokens.ids
            elif got.HasField("finished"):
                self.finished = got.finished
            if up_to is not None and len(self.ids) >= up_to:
                break
        call.cancel()

    def resumption(self, with_ids: bool = True) -> generation_pb2.ResumeRequest:
        ids = generation_pb2.TokenIds(ids=self.ids if with_ids else ())
        return generation_pb2.ResumeRequest(
            stream_id=self.stream_id, num_tokens=len(self.ids), token_ids=ids, has_rest=self.has_rest
        )


@pytest.mark.parametrize("taken", range(NUM_TOKENS))
async def test_another_router_goes_on_after_any_token(model_dir: Path, journal_url: str, taken: int) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.02
    async with two_routers(model_dir, journal_url, worker) as (first, second):
        reader = Reader()
        await reader.read(first.stub().Generate(message()), up_to=taken)
        await reader.read(second.stub().Resume(reader.resumption()))
    assert reader.ids == TOKENS
    assert reader.text == TextCodec(model_dir / "tokenizer.json").decode(TOKENS)
    assert reader.finished is not None
    assert reader.finished.num_output_tokens == NUM_TOKENS
    # Nobody, if the first router wrote the last token down before it saw that its client was gone.
    assert reader.finished.stats.decode_worker_id in ("mixed-0-twin", "")


async def test_a_resumed_stream_can_be_resumed_again_and_by_the_same_router(model_dir: Path, journal_url: str) -> None:
    async with running_cluster(
        model_dir, FakeWorker("mixed-0", "mixed"), journal=open_journal(journal_url, "")
    ) as cluster:
        cluster.workers[0].step_s = 0.02
        reader = Reader()
        stub = cluster.stub()
        await reader.read(stub.Generate(message()), up_to=3)
        await reader.read(stub.Resume(reader.resumption()), up_to=6)
        await reader.read(stub.Resume(reader.resumption()))
    assert reader.ids == TOKENS
    # What one placement may still say can never be taken for another's.
    submits = cluster.workers[0].submits
    assert len({submit.stream_id for submit in submits}) == len(submits) >= 2


async def test_a_stream_that_ended_unseen_is_given_from_the_journal(model_dir: Path, journal_url: str) -> None:
    async with two_routers(model_dir, journal_url, FakeWorker("mixed-0", "mixed")) as (first, second):
        reader = Reader()
        await reader.read(first.stub().Generate(message()))
        for kept in (5, NUM_TOKENS):
            late = Reader()
            late.stream_id, late.ids = reader.stream_id, TOKENS[:kept]
            await late.read(second.stub().Resume(late.resumption(with_ids=False)))
            assert late.ids == TOKENS
            assert late.finished is not None
            assert late.finished.reason == generation_pb2.FINISH_REASON_LENGTH
        assert second.workers[0].submits == []


async def test_only_who_began_a_stream_may_resume_it(model_dir: Path, journal_url: str) -> None:
    async with two_routers(model_dir, journal_url, FakeWorker("mixed-0", "mixed")) as (first, second):
        first.workers[0].step_s = 0.02
        reader = Reader()
        await reader.read(first.stub().Generate(message(), metadata=MINE), up_to=4)
        for metadata in ((), (("authorization", "Bearer somebody else"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Reader().read(second.stub().Resume(reader.resumption(), metadata=metadata))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        await reader.read(second.stub().Resume(reader.resumption(), metadata=MINE))
    assert reader.ids == TOKENS
    salts = {submit.tenant_salt for cluster in (first, second) for submit in cluster.workers[0].submits}
    assert len(salts) == 1
    assert b"" not in salts


async def test_a_stop_text_is_found_across_the_seam(model_dir: Path, journal_url: str) -> None:
    codec = TextCodec(ModelFiles.load(str(model_dir), MODEL).tokenizer_json)
    text = codec.decode(TOKENS)
    before = len(codec.decode(TOKENS[:5]))
    stop = text[before - 1 : before + 2]  # begins in one token and ends in a later one
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.002
    async with two_routers(model_dir, journal_url, worker) as (first, second):
        reader = Reader()
        await reader.read(first.stub().Generate(message(stop=[stop])), up_to=5)
        await reader.read(second.stub().Resume(reader.resumption()))
    assert reader.text == text[: text.index(stop)]
    assert reader.finished is not None
    assert reader.finished.reason == generation_pb2.FINISH_REASON_STOP


async def test_whoever_had_the_stream_before_stops(model_dir: Path, journal_url: str) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.02
    async with two_routers(model_dir, journal_url, worker) as (first, second):
        old, new = Reader(), Reader()
        call = first.stub().Generate(message(max_tokens=500))
        reading = asyncio.create_task(old.read(call))
        await until(lambda: len(old.ids) >= 2, "it streams")
        new.stream_id = old.stream_id
        await new.read(second.stub().Resume(new.resumption(with_ids=False)), up_to=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "resumed elsewhere" in (caught.value.details() or "")
    expected = expected_tokens(PROMPT, 500)
    assert new.ids == expected[: len(new.ids)]
    assert old.ids == expected[: len(old.ids)]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"stream_id": "nobody"}, "NOT_FOUND", "stream_id: 'nobody' is not known"),
        ({"num_tokens": 13}, "INVALID_ARGUMENT", "num_tokens: 13 cannot be resumed"),
        ({"token_ids": [1]}, "INVALID_ARGUMENT", r"token_ids: must be empty or num_tokens \(0\) long"),
        ({"num_tokens": 1, "token_ids": [4096]}, "INVALID_ARGUMENT", "token_ids: id 4096 at index 0"),
        ({"num_tokens": 1, "token_ids": [7]}, "INVALID_ARGUMENT", "token_ids: id 7 at position 0 was never sent"),
    ],
)
async def test_what_cannot_be_resumed_is_refused_by_name(
    model_dir: Path, journal_url: str, changes: dict[str, object], status: str, words: str
) -> None:
    async with running_cluster(
        model_dir, FakeWorker("mixed-0", "mixed"), journal=open_journal(journal_url, "")
    ) as cluster:
        reader = Reader()
        stub = cluster.stub()
        await reader.read(stub.Generate(message()))
        fields = {"stream_id": reader.stream_id, **changes}
        fields["token_ids"] = generation_pb2.TokenIds(ids=fields.get("token_ids", ()))
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await Reader().read(stub.Resume(generation_pb2.ResumeRequest(**fields)))
    assert caught.value.code().name == status


async def test_a_refused_resumption_takes_the_stream_from_nobody(model_dir: Path, journal_url: str) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.02
    async with running_cluster(model_dir, worker, journal=open_journal(journal_url, "")) as cluster:
        reader, stub = Reader(), cluster.stub()
        reading = asyncio.create_task(reader.read(stub.Generate(message(max_tokens=60))))
        await until(lambda: len(reader.ids) >= 3, "it streams")
        for num_tokens in (1900, 1):
            wrong = generation_pb2.ResumeRequest(
                stream_id=reader.stream_id, num_tokens=num_tokens, token_ids=generation_pb2.TokenIds(ids=[7])
            )
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                await Reader().read(stub.Resume(wrong))
        await reading
    assert reader.ids == expected_tokens(PROMPT, 60)


async def test_without_a_journal_no_stream_is_known(model_dir: Path) -> None:
    async with running_cluster(model_dir, FakeWorker("mixed-0", "mixed")) as cluster:
        with pytest.raises(grpc.aio.AioRpcError, match="is not known here"):
            await Reader().read(cluster.stub().Resume(generation_pb2.ResumeRequest(stream_id="s")))
        assert not cluster.router.readiness().streams_can_resume
        assert not cluster.router.readiness().is_degraded


@pytest.mark.redis
async def test_streams_run_on_while_the_journal_is_away_and_are_written_down_when_it_is_back(
    model_dir: Path, redis_server: RedisServer
) -> None:
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.005
    journal = open_journal(redis_server.url, "")
    async with running_cluster(model_dir, worker, journal=journal) as cluster:
        reader = Reader()
        reading = asyncio.create_task(reader.read(cluster.stub().Generate(message(max_tokens=1500))))
        await until(lambda: len(reader.ids) >= 3, "it streams")
        await asyncio.to_thread(redis_server.kill)
        await until(lambda: cluster.router.readiness().is_degraded, "it is seen")
        num_before = len(reader.ids)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Reader().read(cluster.stub().Resume(generation_pb2.ResumeRequest(stream_id=reader.stream_id)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: len(reader.ids) > num_before, "it streams on")
        await asyncio.to_thread(redis_server.start)
        await until(lambda: not cluster.router.readiness().is_degraded, "it is back")
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        kept = Reader()
        kept.stream_id = reader.stream_id
        await kept.read(cluster.stub().Resume(kept.resumption()), up_to=len(reader.ids) + 5)
    assert kept.ids == expected_tokens(PROMPT, len(kept.ids))


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("taken", [1, 4, NUM_TOKENS])
async def test_an_http_client_comes_back_with_the_last_event_id(
    model_dir: Path, journal_url: str, path: str, taken: int
) -> None:
    prompt = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": list(PROMPT)}
    body = {"model": MODEL, "stream": True, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    worker = FakeWorker("mixed-0", "mixed")
    worker.step_s = 0.002

    async def read(url: str, last: str | None, num_chunks: int | None) -> tuple[list[int], str | None]:
        ids: list[int] = []
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream(
                "POST", f"{url}/v1/{path}", json=body | prompt, headers={"Last-Event-ID": last} if last else {}
            ) as answer,
        ):
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    last = line.removeprefix("id: ")
                elif line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    ids += choice.get("token_ids", ())
                    if num_chunks is not None and len(ids) >= num_chunks:
                        break
        return ids, last

    async with two_routers(model_dir, journal_url, worker) as (first, second):
        seen, last = await read(first.http_url, None, taken)
        rest, _ = await read(second.http_url, last, None)
        whole, _ = await read(second.http_url, None, None)
    assert seen + rest == whole
    assert len(whole) == NUM_TOKENS


@pytest.mark.parametrize("event_id", ["x", "/3", "s/", "s/-1", "s/1e3", "s/9999999999"])
async def test_an_event_id_that_is_none_is_refused(model_dir: Path, event_id: str) -> None:
    async with running_cluster(model_dir, FakeWorker("mixed-0", "mixed")) as cluster, httpx.AsyncClient() as client:
        answer = await client.post(
            f"{cluster.http_url}/v1/completions",
            json={"model": MODEL, "prompt": "x", "stream": True},
            headers={"Last-Event-ID": event_id},
        )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Last-Event-ID"


@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ({"last": "nobody/3"}, 404, "nobody"),
        ({"num_tokens": 9999}, 400, "9999"),
        ({"authorization": "Bearer another"}, 404, "stream_id"),
        ({"stream": False}, 400, "streamed"),
    ],
)
async def test_what_cannot_be_resumed_over_http_is_laid_to_the_header(
    model_dir: Path, journal_url: str, changed: dict[str, object], status: int, said: str
) -> None:
    body = {"model": MODEL, "prompt": list(PROMPT), "stream": True, "max_tokens": 4}
    async with (
        two_routers(model_dir, journal_url, FakeWorker("mixed-0", "mixed")) as (first, second),
        httpx.AsyncClient(timeout=30) as client,
    ):
        whole = await client.post(f"{first.http_url}/v1/completions", json=body)
        (stream_id, _) = whole.text.split("id: ")[1].split("\n")[0].split("/")
        last = str(changed.get("last", f"{stream_id}/{changed.get('num_tokens', 2)}"))
        answer = await client.post(
            f"{second.http_url}/v1/completions",
            json={**body, "stream": changed.get("stream", True)},
            headers={"Last-Event-ID": last, "Authorization": str(changed.get("authorization", ""))},
        )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == "Last-Event-ID"
    assert error["message"].startswith("Last-Event-ID: ")
    assert said in error["message"]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"prompt": [*PROMPT, 1]}, "prompt"),
        ({"prompt": "hello"}, "prompt"),
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 8}, "seed"),
        ({"stop": ["x"]}, "stop"),
        ({"max_tokens": 3}, "max_tokens"),
        ({}, None),
    ],
)
async def test_a_stream_is_not_resumed_with_another_request(
    model_dir: Path, journal_url: str, changed: dict[str, object], field: str | None
) -> None:
    """The header alone counted: a client that sent another prompt with it got the answer to the first one."""
    body = {"model": MODEL, "prompt": list(PROMPT), "stream": True, "max_tokens": 4, "temperature": 0.7, "seed": 7}
    async with (
        two_routers(model_dir, journal_url, FakeWorker("mixed-0", "mixed")) as (first, second),
        httpx.AsyncClient(timeout=30) as client,
    ):
        whole = await client.post(f"{first.http_url}/v1/completions", json=body)
        (stream_id, _) = whole.text.split("id: ")[1].split("\n")[0].split("/")
        url, headers = f"{second.http_url}/v1/completions", {"Last-Event-ID": f"{stream_id}/2"}
        answer = await client.post(url, json={**body, **changed}, headers=headers)
        again = await client.post(url, json=body, headers=headers)
    assert answer.status_code == (200 if field is None else 400)
    if field is not None:
        assert answer.json()["error"]["param"] == field
    assert again.status_code == 200
