"""What routers know of blocks that they did not send: two of them before real workers with the fake engine."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable

import pytest
from switchyard.v1 import worker_pb2
from switchyard_client import GenerationClient

from tests.cluster.deaths import prompt
from tests.fake_cluster import FakeCluster
from tests.fake_model import expected
from tests.processes import wait_until
from tests.workers.worker_client import WorkerClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NUM_TOKENS = 400  # of a prompt; a hundred blocks
NUM_BLOCKS = 256  # of a worker
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def said(cluster: FakeCluster, url: str, name: str, metric: str = "known_blocks") -> float:
    """What a router has of a worker; -1 when it has nothing."""
    with _OPENER.open(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    worker_id = cluster.workers[name].ready["worker_id"]
    sample = f'switchyard_worker_{metric}{{pool="mixed",role="mixed",worker="{worker_id}"}} '
    return next((float(line.removeprefix(sample)) for line in lines if line.startswith(sample)), -1.0)


def is_quiet(cluster: FakeCluster, url: str) -> bool:
    """Whether nothing but the blocks they hold distinguishes the workers, in a router's eyes."""
    return all(
        said(cluster, url, name, "steps_total") == cluster.load(name).num_steps
        and said(cluster, url, name, "free_blocks") == NUM_BLOCKS
        and said(cluster, url, name, "running_requests") == said(cluster, url, name, "queued_tokens") == 0
        for name in cluster.workers
    )


def decode_worker_of(cluster: FakeCluster, client: GenerationClient, url: str, ending: int) -> str:
    """The worker that takes prompt 1 with a new ending, whose beginning it must hold."""
    wait_until(lambda: is_quiet(cluster, url), "the last request is over and reported")
    answer = cluster.ask(client, [*prompt(1, NUM_TOKENS), ending], 2)
    assert answer.ids == expected(answer.prompt, 2)
    assert answer.finished is not None
    assert answer.finished.stats.num_cached_prompt_tokens == NUM_TOKENS
    worker_id = answer.finished.stats.decode_worker_id
    return next(name for name, server in cluster.workers.items() if server.ready["worker_id"] == worker_id)


def compute(client: WorkerClient, number: int) -> None:
    """Have a worker compute a prompt behind the routers' backs."""
    client.submit(f"s{number}", prompt(number, NUM_TOKENS), worker_pb2.REQUEST_ROLE_MIXED, max_tokens=1)
    client.wait_finished(f"s{number}")


def test_a_router_knows_what_another_one_had_computed_and_what_was_evicted(
    fake_cluster: Callable[..., FakeCluster],
) -> None:
    cluster = fake_cluster(
        prefill=0,
        decode=0,
        mixed=2,
        uses_arena=False,
        engine={"num_blocks": NUM_BLOCKS, "max_num_seqs": 8},
        router={"prefill_ms_per_token": 50.0, "transfer_ms_per_block": 1e6},  # what is held decides, nothing else
    )
    first, second = cluster.client(), cluster.client(1)
    url = cluster.http_urls[1]
    for name in cluster.workers:
        wait_until(lambda name=name: said(cluster, url, name) == 0, f"{name} said that it holds nothing")

    answer = cluster.ask(first, prompt(1, NUM_TOKENS), 2)
    assert answer.finished is not None
    worker_id = answer.finished.stats.decode_worker_id
    holder = next(name for name, server in cluster.workers.items() if server.ready["worker_id"] == worker_id)
    (other,) = set(cluster.workers) - {holder}
    wait_until(lambda: said(cluster, url, holder) >= 100, "the other router got the block events")
    # An even chance each, if it did not know.
    assert [decode_worker_of(cluster, second, url, ending) for ending in range(5)] == [holder] * 5

    with WorkerClient(cluster.workers[holder].ready["address"]) as worker:
        for number in (2, 3, 4, 5):
            compute(worker, number)
    with WorkerClient(cluster.workers[other].ready["address"]) as worker:
        compute(worker, 1)
    wait_until(lambda: said(cluster, url, other) >= 100, "the other worker said what it has")
    wait_until(lambda: said(cluster, url, holder) >= NUM_BLOCKS - 8, "the first one is full of other prompts")
    assert [decode_worker_of(cluster, second, url, ending) for ending in range(5, 10)] == [other] * 5
    cluster.wait_at_rest()
