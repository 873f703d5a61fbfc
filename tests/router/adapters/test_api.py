"""Adapters over real sockets: loaded, named as models, listed, replaced and unloaded, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
from switchyard_client import GenerationClient, GenerationError, ServedAdapter

from checkpoint.adapters.directory import adapter_digest
from kvstore.control.adapter_registry import MemoryAdapterRegistry
from kvstore.names import block_names, root_name
from router.adapters.config import AdaptersConfig
from router.placement.residency import by_rendezvous
from router.service.text import TextCodec
from tests.router.adapters.lora_files import TARGETS, write_adapter
from tests.router.api.asking import PROMPT, collect, request
from tests.router.conftest import MODEL, QUICK, Adapters, Cluster, pair, running_cluster, until
from tests.router.fake_worker import BLOCK_SIZE, FakeWorker, expected_tokens

TEXT = "def fibonacci(n):"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("sql", "law")):
        write_adapter(tmp_path / "root" / name, seed)
    return tmp_path / "root"


def known(root: Path, registry: MemoryAdapterRegistry | None = None, **changes: object) -> Adapters:
    config = AdaptersConfig(enabled=True, root=str(root), load_timeout_s=5.0)
    return Adapters(dataclasses.replace(config, **changes), TARGETS, registry)


def worker(number: int = 0) -> FakeWorker:
    made = FakeWorker(f"mixed-{number}", "mixed")
    made.holds_adapters()
    return made


@asynccontextmanager
async def served(
    model_dir: Path, adapters: Adapters, *workers: FakeWorker
) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    async with (
        running_cluster(model_dir, *(workers or (worker(),)), adapters=adapters) as cluster,
        httpx.AsyncClient(base_url=cluster.http_url, timeout=20) as client,
    ):
        yield cluster, client


async def load(client: httpx.AsyncClient, name: str, path: str, **more: object) -> httpx.Response:
    return await client.post(LOAD, json={"lora_name": name, "lora_path": path, **more})


def said(model_dir: Path, digest: bytes = b"", num_tokens: int = 12) -> str:
    codec = TextCodec(model_dir / "tokenizer.json")
    return codec.decode(expected_tokens(codec.encode(TEXT, True), num_tokens, digest))


async def test_an_adapter_is_a_model_to_the_openai_client(model_dir: Path, root: Path) -> None:
    workers = pair()
    for one in workers:
        one.holds_adapters()
    async with (
        served(model_dir, known(root), *workers) as (cluster, client),
        openai.AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as stock,
    ):
        with pytest.raises(openai.NotFoundError, match="'sql-lora' is not served here; 'tiny' is"):
            await stock.completions.create(model="sql-lora", prompt=TEXT)
        answer = await load(client, "sql-lora", "sql")
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql-lora' added successfully.")
        digest = adapter_digest(root / "sql")
        for model, expected in ((MODEL, b""), ("sql-lora", digest)):
            completion = await stock.completions.create(model=model, prompt=TEXT, max_tokens=12, temperature=0)
            assert completion.choices[0].text == said(model_dir, expected)
            assert completion.model == model
        chat = await stock.chat.completions.create(
            model="sql-lora", messages=[{"role": "user", "content": "hi"}], max_tokens=4
        )
        assert chat.model == "sql-lora"
        both = await stock.completions.create(model="sql-lora", prompt=TEXT, max_tokens=12, temperature=0, n=2)
        assert [choice.text for choice in both.choices] == [said(model_dir, digest)] * 2
        response = await stock.responses.create(model="sql-lora", input="hi", max_output_tokens=4)
        assert response.model == "sql-lora"
        tokens = (await client.post("/tokenize", json={"model": "sql-lora", "prompt": TEXT})).json()
        assert tokens == (await client.post("/tokenize", json={"model": MODEL, "prompt": TEXT})).json()
        cards = {card.id: card.to_dict() for card in (await stock.models.list()).data}
        assert (cards[MODEL]["parent"], cards["sql-lora"]["parent"]) == (None, MODEL)
        assert cards["sql-lora"]["root"] == str(root / "sql")
        assert (await stock.models.retrieve("sql-lora")).to_dict() == cards["sql-lora"]
        for one in workers:
            sent = [(submit.adapter.name, submit.adapter.digest, submit.adapter.path) for submit in one.submits]
            assert sent == [("", b"", ""), *[("sql-lora", digest, str(root / "sql"))] * 5]
        answer = await client.post(UNLOAD, json={"lora_name": "sql-lora"})
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql-lora' removed successfully.")
        with pytest.raises(openai.NotFoundError):
            await stock.completions.create(model="sql-lora", prompt=TEXT)
        again = await stock.completions.create(model=MODEL, prompt=TEXT, max_tokens=12, temperature=0)
        assert again.choices[0].text == said(model_dir)
        metrics = (await client.get("/metrics")).text
        assert 'switchyard_adapter_requests_total{adapter="sql-lora"} 5.0' in metrics
        assert 'switchyard_adapter_loads_total{outcome="loaded"} 1.0' in metrics
        assert "switchyard_adapters 0.0" in metrics


async def test_the_client_loads_lists_and_unloads(model_dir: Path, root: Path) -> None:
    async with served(model_dir, known(root)) as (cluster, _):
        digest = adapter_digest(root / "sql")

        def talk() -> None:
            with GenerationClient(cluster.grpc_address) as client:
                sql = ServedAdapter("sql-lora", digest.hex(), str(root / "sql"), MODEL)
                assert client.load_adapter("sql-lora", str(root / "sql")) == sql
                assert client.adapters() == (sql,)
                assert [(one.name, one.parent, one.root) for one in client.models()] == [
                    (MODEL, "", ""),
                    ("sql-lora", MODEL, str(root / "sql")),
                ]
                with pytest.raises(GenerationError, match="load_inplace") as taken:
                    client.load_adapter("sql-lora", "law")
                assert taken.value.status == "ALREADY_EXISTS"
                law = client.load_adapter("sql-lora", "law", load_inplace=True)
                assert law.digest == adapter_digest(root / "law").hex()
                client.unload_adapter("sql-lora")
                with pytest.raises(GenerationError, match=r"name: no adapter 'sql-lora' is loaded") as unknown:
                    client.unload_adapter("sql-lora")
                assert unknown.value.status == "NOT_FOUND"
                assert client.adapters() == ()
                client.load_adapter("sql-lora", "sql")

        await asyncio.to_thread(talk)
        order = dataclasses.replace(request(), model="sql-lora")
        started, ids, _, _ = await collect(cluster.grpc_address, order)
        assert started.model == "sql-lora"
        assert ids == expected_tokens(PROMPT, 20, digest)


WRONG = [
    ({"lora_name": "x"}, 400, "lora_path"),
    ({"lora_name": "x", "lora_path": 7}, 400, "lora_path"),
    ({"lora_name": "x", "lora_path": "sql", "lora_rank": 7}, 400, "lora_rank"),
    ({"lora_name": "x", "lora_path": "sql", "base_model_name": "llama"}, 400, "base_model_name"),
    ({"lora_name": "", "lora_path": "sql"}, 400, "lora_name"),
    ({"lora_name": "a\nb", "lora_path": "sql"}, 400, "lora_name"),
    ({"lora_name": "x" * 257, "lora_path": "sql"}, 400, "lora_name"),
    ({"lora_name": MODEL, "lora_path": "sql"}, 409, "lora_name"),
    ({"lora_name": "x", "lora_path": "none"}, 400, "lora_path"),
    ({"lora_name": "x", "lora_path": "../root2"}, 403, "lora_path"),
    ({"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path"),
    ({"lora_name": "x", "lora_path": "pickled"}, 400, "lora_path"),
    ({"lora_name": "x", "lora_path": "other-base"}, 400, "lora_path"),
    ({"lora_name": "x", "lora_path": "damaged"}, 400, "lora_path"),
]


async def test_what_cannot_be_loaded_is_refused_by_field_and_harms_nobody(model_dir: Path, root: Path) -> None:
    write_adapter(root / "pickled")
    (root / "pickled" / "adapter_model.bin").touch()
    write_adapter(root / "other-base", modules={"model.layers.0.self_attn.q_proj": (64, 64)})
    tensors = write_adapter(root / "damaged") / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    async with served(model_dir, known(root)) as (_, client):
        for body, status, param in WRONG:
            answer = await client.post(LOAD, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param), (body, error)
            assert error["message"].count("\n") == 0
        other = (await load(client, "x", "other-base")).json()["error"]
        assert "model.layers.0.self_attn.q_proj.lora_A.weight is [4, 64]" in other["message"]
        assert other["code"] == "adapter_refused"
        assert (await client.post(UNLOAD, json={"lora_name": "x"})).status_code == 404
        assert len((await client.get("/v1/models")).json()["data"]) == 1
        # A name that a failed load had taken is free again.
        await until_ok(client, "x", "sql")
        answer = await client.post(
            "/v1/completions", json={"model": MODEL, "prompt": TEXT, "temperature": 0, "max_tokens": 12}
        )
        assert answer.json()["choices"][0]["text"] == said(model_dir)


async def until_ok(client: httpx.AsyncClient, name: str, path: str) -> None:
    for _ in range(200):
        if (await load(client, name, path)).status_code == 200:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{name} could not be loaded")


@pytest.mark.parametrize(
    ("config", "key"),
    [(AdaptersConfig(), "adapters.enabled"), (AdaptersConfig(enabled=True), "adapters.root")],
    ids=["all off", "no root"],
)
async def test_loading_is_off_unless_a_root_is_set(model_dir: Path, config: AdaptersConfig, key: str) -> None:
    async with served(model_dir, Adapters(config, TARGETS)) as (cluster, client):
        for answer in (await load(client, "x", "sql"), await client.post(UNLOAD, json={"lora_name": "x"})):
            assert answer.status_code == 404
            assert key in answer.json()["error"]["message"]

        def talk() -> None:
            with GenerationClient(cluster.grpc_address) as grpc_client:
                for call in (lambda: grpc_client.load_adapter("x", "sql"), lambda: grpc_client.unload_adapter("x")):
                    with pytest.raises(GenerationError, match=key) as off:
                        call()
                    assert off.value.status == "UNIMPLEMENTED"
                assert grpc_client.adapters() == ()

        await asyncio.to_thread(talk)


async def test_statuses_of_grpc(model_dir: Path, root: Path) -> None:
    async with served(model_dir, known(root)) as (cluster, _):

        def talk() -> None:
            with GenerationClient(cluster.grpc_address) as client:
                for name, path, status in (
                    ("x", "../outside", "PERMISSION_DENIED"),
                    ("x", "none", "INVALID_ARGUMENT"),
                    ("", "sql", "INVALID_ARGUMENT"),
                    (MODEL, "sql", "ALREADY_EXISTS"),
                ):
                    with pytest.raises(GenerationError) as refused:
                        client.load_adapter(name, path)
                    assert refused.value.status == status

        await asyncio.to_thread(talk)
        with pytest.raises(GenerationError) as unknown:
            await collect(cluster.grpc_address, dataclasses.replace(request(), model="nobody"))
        assert unknown.value.status == "NOT_FOUND"


async def test_adapters_of_the_configuration_are_there_from_the_start(model_dir: Path, root: Path) -> None:
    modules = {"sql-lora": str(root / "sql"), "broken": str(root / "none")}
    async with served(model_dir, known(root, modules=modules)) as (cluster, client):
        body = {"model": "sql-lora", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
        answer = await client.post("/v1/completions", json=body)  # it waits, if it must
        assert answer.json()["choices"][0]["text"] == said(model_dir, adapter_digest(root / "sql"))
        assert (await client.post("/v1/completions", json={**body, "model": "broken"})).status_code == 404
        refused = await load(client, "sql-lora", "law", load_inplace=True)
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "lora_name")
        stays = await client.post(UNLOAD, json={"lora_name": "sql-lora"})
        assert (stays.status_code, stays.json()["error"]["code"]) == (409, "adapter_configured")

        def talk() -> None:
            with (
                GenerationClient(cluster.grpc_address) as grpc_client,
                pytest.raises(GenerationError, match=r"adapters\.modules") as stays,
            ):
                grpc_client.unload_adapter("sql-lora")
            assert stays.value.status == "FAILED_PRECONDITION"

        await asyncio.to_thread(talk)


async def test_replacing_in_place_changes_new_requests_and_not_those_that_run(model_dir: Path, root: Path) -> None:
    slow = worker()
    async with served(model_dir, known(root), slow) as (cluster, client):
        old = adapter_digest(root / "sql")
        await load(client, "a", "sql")
        slow.step_s = 0.01
        order = dataclasses.replace(request(), model="a")
        running = asyncio.create_task(collect(cluster.grpc_address, order))
        await until(lambda: slow.num_sent > 2, "it runs")
        shutil.rmtree(root / "sql")
        write_adapter(root / "sql", seed=9)
        assert (await load(client, "a", "sql")).status_code == 409
        assert (await load(client, "a", "sql", load_inplace=True)).status_code == 200
        new = adapter_digest(root / "sql")
        assert new != old
        assert (await running)[1] == expected_tokens(PROMPT, 20, old)
        assert (await collect(cluster.grpc_address, order))[1] == expected_tokens(PROMPT, 20, new)


async def test_unloading_lets_what_runs_run(model_dir: Path, root: Path) -> None:
    slow = worker()
    async with served(model_dir, known(root), slow) as (cluster, client):
        await load(client, "a", "sql")
        slow.step_s = 0.01
        order = dataclasses.replace(request(), model="a")
        running = asyncio.create_task(collect(cluster.grpc_address, order))
        await until(lambda: slow.num_sent > 2, "it runs")
        assert (await client.post(UNLOAD, json={"lora_name": "a"})).status_code == 200
        with pytest.raises(GenerationError, match="is not served here"):
            await collect(cluster.grpc_address, order)
        assert (await running)[1] == expected_tokens(PROMPT, 20, adapter_digest(root / "sql"))


async def test_the_other_routers_of_a_cluster_serve_it_too(model_dir: Path, root: Path) -> None:
    registry = MemoryAdapterRegistry()
    async with (
        served(model_dir, known(root, registry)) as (_, first),
        running_cluster(model_dir, worker(1), adapters=known(root, registry)) as other,
        httpx.AsyncClient(base_url=other.http_url, timeout=20) as second,
    ):
        await load(first, "a", "sql")
        body = {"model": "a", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
        answer = await second.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == said(model_dir, adapter_digest(root / "sql"))
        assert (await load(second, "a", "law")).status_code == 409
        assert (await second.post(UNLOAD, json={"lora_name": "a"})).status_code == 200

        async def is_gone() -> bool:
            return (await first.post("/v1/completions", json=body)).status_code == 404

        for _ in range(500):
            if await is_gone():
                break
            await asyncio.sleep(0.01)
        assert await is_gone()


async def test_blocks_are_found_again_with_the_same_adapter_only(model_dir: Path, root: Path) -> None:
    workers = [worker(number) for number in range(2)]
    for one in workers:
        one.held = {}
    async with served(model_dir, known(root), *workers) as (cluster, client):
        await load(client, "a", "sql")
        digest = adapter_digest(root / "sql")
        fleet = cluster.router._dispatcher.fleet
        await until(lambda: all(fleet.num_reported_blocks(one.worker_id) == 0 for one in workers), "they said it")
        prompt = tuple(range(1, 1 + 20 * BLOCK_SIZE))
        away = by_rendezvous(digest, ["mixed-0", "mixed-1"])[1]
        names = block_names(root_name(b"fingerprint-0001", b"", digest), prompt, BLOCK_SIZE, with_tail=False)
        home = next(one for one in workers if one.worker_id != away)
        home.hold(names)
        await until(lambda: fleet.num_reported_blocks(home.worker_id) == len(names), "it said it")
        order = dataclasses.replace(request(prompt, max_tokens=2), model="a")
        started, _, _, finished = await collect(cluster.grpc_address, order)
        assert finished.stats.decode_worker_id == home.worker_id
        views = {one.worker_id: one for one in fleet.views({next(iter(fleet.layouts)): names}, digest)}
        assert views[home.worker_id].num_cached_tokens == len(prompt)
        base = block_names(root_name(b"fingerprint-0001", b""), prompt, BLOCK_SIZE, with_tail=False)
        views = {one.worker_id: one for one in fleet.views({next(iter(fleet.layouts)): base})}
        assert views[home.worker_id].num_cached_tokens == 0
        assert started.model == "a"


async def test_the_homes_of_a_pinned_adapter_are_told_to_keep_it(model_dir: Path, root: Path) -> None:
    workers = [worker(number) for number in range(3)]
    modules = {"law": str(root / "law")}
    async with served(model_dir, known(root, modules=modules, pinned=("law",)), *workers) as (_, client):
        law, sql = (adapter_digest(root / name) for name in ("law", "sql"))
        by_id = {one.worker_id: one for one in workers}

        def kept(digest: bytes) -> list[str]:
            return [one.worker_id for one in workers if one.pins and digest in one.pins[-1]]

        await until(
            lambda: kept(law) == by_rendezvous(law, by_id)[:1], "the home of an adapter of the configuration keeps it"
        )
        assert (await load(client, "sql-lora", "sql", pin=True)).status_code == 200
        home, heir = by_rendezvous(sql, by_id)[:2]
        await until(lambda: kept(sql) == [home], "the home of one that was loaded keeps it")
        await by_id[home].kill()
        await until(lambda: heir in kept(sql), "the next one keeps it when the home is gone")
        assert (await client.post(UNLOAD, json={"lora_name": "sql-lora"})).status_code == 200
        await until(lambda: sql not in by_id[heir].pins[-1], "it is let go")
        assert (await load(client, "sql-lora", "sql")).status_code == 200
        num_pins = len(by_id[heir].pins)
        await asyncio.sleep(5 * QUICK.directory_poll_s)
        assert len(by_id[heir].pins) == num_pins  # nothing is sent that has not changed
