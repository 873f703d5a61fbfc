"""Adapters in clusters of processes that die: a stream keeps the bytes that it began with, and no block is mixed up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from switchyard_client import GenerationError

from checkpoint.adapters.directory import adapter_digest
from tests.cluster.deaths import STEP_S, Once, busy, prompt
from tests.fake_cluster import FakeCluster
from tests.fake_model import expected
from tests.processes import RedisServer, wait_until
from tests.router.adapters.lora_files import write_adapter

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NUM_TOKENS = 48
NAMES = ("sql", "law", "art")
MakeCluster = Callable[..., FakeCluster]
MODULES = {f"model.layers.{layer}.self_attn.q_proj": (8, 16) for layer in range(2)}  # of tests.fake_model.SIZES


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        write_adapter(tmp_path / "root" / name, seed, modules=MODULES)
    return tmp_path / "root"


@pytest.fixture(params=["file", pytest.param("redis", marks=pytest.mark.redis)])
def control(request: pytest.FixtureRequest) -> str:
    """Where the routers keep what they share: "" means in files of the cluster's folder."""
    if request.param == "file":
        return ""
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url


def right(number: int, digest: bytes = b"") -> list[int]:
    return expected(prompt(number), NUM_TOKENS, adapter=digest)


def test_what_one_router_loads_all_serve_and_each_request_gets_its_own(
    fake_cluster: MakeCluster, root: Path, control: str, request: pytest.FixtureRequest
) -> None:
    cluster = fake_cluster(adapters_root=str(root), control=control, cluster=f"adapters-{id(request)}", journal=control)
    loader, user = cluster.client(0), cluster.client(1)
    for name in NAMES:
        loader.load_adapter(name, name)
    digests = {"": b"", **{name: adapter_digest(root / name) for name in NAMES}}

    def ask(number: int) -> None:
        """One prompt with each adapter and with none, twice: blocks of an earlier one are not taken for it."""
        for name, digest in [*digests.items(), *digests.items()]:
            assert cluster.ask(user, prompt(number % 3), NUM_TOKENS, model=name).ids == right(number % 3, digest)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, range(6)))
    user.unload_adapter("law")
    with pytest.raises(GenerationError) as gone:
        cluster.ask(user, prompt(1), 4, model="law")
    assert gone.value.status == "NOT_FOUND"
    wait_until(lambda: [one.name for one in loader.adapters()] == ["art", "sql"], "the other router knows, too")
    cluster.wait_at_rest()


@pytest.mark.parametrize("position", [0, 1, 16, 40])
@pytest.mark.parametrize("victim", ["decode", "prefill", "router"])
def test_a_death_leaves_the_stream_with_its_adapter(
    fake_cluster: MakeCluster, root: Path, victim: str, position: int
) -> None:
    cluster = fake_cluster(adapters_root=str(root), step_s=STEP_S)
    client = cluster.client()
    client.load_adapter("sql", "sql")
    digest = adapter_digest(root / "sql")

    def kill() -> None:
        name = "router-0" if victim == "router" else busy(cluster, victim)
        if name:
            cluster.kill(name)

    once = Once(position, kill)
    assert cluster.ask(client, prompt(position), NUM_TOKENS, once, model="sql").ids == right(position, digest)
    assert once.num_tokens_at_action is not None


def test_a_stream_goes_on_at_another_router_with_bytes_that_have_lost_their_name(
    fake_cluster: MakeCluster, root: Path
) -> None:
    cluster = fake_cluster(adapters_root=str(root), step_s=STEP_S)
    client, other = cluster.client(), cluster.client(1)
    client.load_adapter("a", "sql")
    old, new = (adapter_digest(root / name) for name in ("sql", "law"))

    def replace_and_kill() -> None:
        other.load_adapter("a", "law", load_inplace=True)
        cluster.kill("router-0")

    once = Once(10, replace_and_kill)
    assert cluster.ask(client, prompt(0), NUM_TOKENS, once, model="a").ids == right(0, old)
    assert cluster.ask(other, prompt(0), NUM_TOKENS, model="a").ids == right(0, new)


def test_files_that_are_gone_fail_their_requests_alone(fake_cluster: MakeCluster, root: Path) -> None:
    cluster = fake_cluster(adapters_root=str(root), prefill=0, decode=0, mixed=2)
    client = cluster.client()
    for name in ("sql", "law"):
        client.load_adapter(name, name)
    digest = adapter_digest(root / "law")
    shutil.rmtree(root / "sql")
    with pytest.raises(GenerationError, match=r"could not be loaded on .*sql") as failed:
        cluster.ask(client, prompt(0), 4, model="sql")
    assert failed.value.status == "UNAVAILABLE"
    assert cluster.ask(client, prompt(0), NUM_TOKENS, model="law").ids == right(0, digest)
    assert cluster.ask(client, prompt(0), NUM_TOKENS).ids == right(0)


def test_bytes_that_changed_under_a_name_are_not_served_by_it(fake_cluster: MakeCluster, root: Path) -> None:
    cluster = fake_cluster(adapters_root=str(root), prefill=0, decode=0, mixed=1)
    client = cluster.client()
    client.load_adapter("sql", "sql")
    write_adapter(root / "sql", seed=99, modules=MODULES)
    with pytest.raises(GenerationError, match="sql"):
        cluster.ask(client, prompt(0), 4, model="sql")
    client.load_adapter("sql", "sql", load_inplace=True)
    assert cluster.ask(client, prompt(0), NUM_TOKENS, model="sql").ids == right(0, adapter_digest(root / "sql"))


def test_a_pinned_adapter_is_loaded_before_somebody_asks_for_it(fake_cluster: MakeCluster, root: Path) -> None:
    cluster = fake_cluster(adapters_root=str(root))
    digest = adapter_digest(root / "sql")
    client = cluster.client()
    assert client.load_adapter("sql", "sql", pin=True).is_pinned

    def holders() -> list[str]:
        return sorted(
            name.partition("-")[0] for name in cluster.workers if digest in cluster.load(name).device_adapters
        )

    wait_until(lambda: holders() == ["decode", "prefill"], "one home of each role holds it")
    assert cluster.ask(client, prompt(0), NUM_TOKENS, model="sql").ids == right(0, digest)
    assert holders() == ["decode", "prefill"]
