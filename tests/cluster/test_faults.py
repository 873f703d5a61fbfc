"""What is not a death: processes that hang, a Redis that goes and comes, shared memory that is full."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc
from switchyard_client import GenerationClient

from tests.cluster.deaths import NUM_TOKENS, STEP_S, Once, at_work, check, moves, prompt
from tests.cluster.test_cut_network import require
from tests.fake_cluster import FakeCluster
from tests.fake_model import expected
from tests.processes import RedisServer, redis_executable, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

MakeCluster = Callable[..., FakeCluster]
Measured = Callable[[str, float], None]


@pytest.mark.parametrize("position", [0, 1, 20])
def test_a_decode_worker_that_hangs_is_left_and_its_late_tokens_are_dropped(
    fake_cluster: MakeCluster, measured: Measured, position: int
) -> None:
    cluster = fake_cluster(step_s=STEP_S)
    hung: list[str] = []

    def hang() -> None:
        hung.append(at_work(cluster, "decode"))
        cluster.workers[hung[0]].signal(signal.SIGSTOP)

    once = Once(position, hang)
    answer = cluster.ask(cluster.client(), prompt(1), NUM_TOKENS, once)
    check(answer, 1)
    assert answer.finished is not None
    assert answer.finished.stats.num_replacements == 1
    measured("pause at a decode worker's hanging (silence is given 1 s)", once.gap_s(answer))
    cluster.workers[hung[0]].signal(signal.SIGCONT)
    cluster.wait_complete()
    cluster.wait_at_rest()
    check(cluster.ask(cluster.client(), prompt(2), NUM_TOKENS), 2)


def test_a_prefill_worker_that_hangs_does_not_hold_its_stream(fake_cluster: MakeCluster, measured: Measured) -> None:
    cluster = fake_cluster(step_s=STEP_S, token_s=0.001, engine={"max_num_batched_tokens": 16})
    with ThreadPoolExecutor(1) as threads:
        answered = threads.submit(cluster.ask, cluster.client(), prompt(1, 150), NUM_TOKENS)
        name = at_work(cluster, "prefill")
        cluster.workers[name].signal(signal.SIGSTOP)
        answer = answered.result()
    check(answer, 1, 150)
    measured("first token when the prefill worker hangs (silence is given 1 s)", answer.longest_gap_s)
    cluster.workers[name].signal(signal.SIGCONT)
    cluster.wait_complete()
    cluster.wait_at_rest()


def test_a_kv_node_that_hangs_costs_time_and_nothing_else(fake_cluster: MakeCluster, measured: Measured) -> None:
    """It holds the arena, the leases and the directory; streams run, and new ones begin, while it says nothing."""
    cluster = fake_cluster(step_s=STEP_S)
    node = cluster.node.server
    once = Once(10, lambda: node.signal(signal.SIGSTOP))
    answer = cluster.ask(cluster.client(), prompt(1), NUM_TOKENS, once)
    check(answer, 1)
    measured("pause at a KV node's hanging, of a stream that decodes", once.gap_s(answer))
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(cluster.ask, cluster.client(), prompt(n, 60), NUM_TOKENS) for n in range(2, 6)]
        for number, answered in enumerate(answers, 2):
            check(answered.result(), number, 60)
            pause_s = max(b - a for a, b in itertools.pairwise(answered.result().times_s))
            measured("pause at a KV node's hanging, of a stream that begins", pause_s)
    node.signal(signal.SIGCONT)
    cluster.wait_complete()
    client = cluster.client()
    wait_until(lambda: moves(cluster, client), "blocks move again")
    cluster.wait_at_rest()


@pytest.mark.redis
def test_a_router_that_hangs_is_left_by_its_clients(
    fake_cluster: MakeCluster, redis_server: RedisServer, measured: Measured
) -> None:
    """Only the client's own probes show it: the machine still answers for the router's connections.

    The journal is in Redis: a router that is stopped while it writes to the file holds the file's lock.
    """
    cluster = fake_cluster(step_s=STEP_S, journal=redis_server.url)
    router = cluster.routers["router-0"]
    client = GenerationClient(cluster.targets, router_silence_s=2.0)
    once = Once(10, lambda: router.signal(signal.SIGSTOP))
    answer = cluster.ask(client, prompt(1), NUM_TOKENS, once)
    check(answer, 1)
    measured("pause at a router's hanging (silence is given 2 s)", once.gap_s(answer))
    router.signal(signal.SIGCONT)
    check(cluster.ask(client, prompt(2), NUM_TOKENS), 2)
    client.close()
    cluster.wait_at_rest()


def test_a_quiet_stream_is_not_taken_for_a_dead_one(fake_cluster: MakeCluster) -> None:
    """Nothing comes for long while a client probes often: neither end may take the other for broken."""
    cluster = fake_cluster(token_s=0.07)
    with GenerationClient(cluster.targets, resume_within_s=0.0, router_silence_s=6.0) as client:
        answer = cluster.ask(client, prompt(1, 128), 4)
    assert answer.ids == expected(prompt(1, 128), 4)
    assert answer.longest_gap_s > 8.0, "it was not quiet for several probes"
    cluster.wait_at_rest()


@pytest.mark.redis
@pytest.mark.parametrize("lost", ["tier", "control"])
def test_a_redis_that_is_killed_and_started_again(
    fake_cluster: MakeCluster, redis_server: RedisServer, measured: Measured, lost: str
) -> None:
    """One is the tier; the other one leases, directory and journal. Streams run on, and afterwards all is as before."""
    executable = redis_executable()
    assert executable is not None
    with ExitStack() as stack:
        control = RedisServer(executable)
        stack.callback(control.kill)
        cluster = fake_cluster(
            step_s=STEP_S, tier=redis_server.url, control=control.url, journal=control.url, uses_arena=False
        )
        client = cluster.client()
        victim = redis_server if lost == "tier" else control
        for number, position in enumerate((0, 1, 32)):
            once = Once(position, victim.kill)
            answer = cluster.ask(client, prompt(number), NUM_TOKENS, once)
            check(answer, number)
            measured(f"pause when the Redis of the {lost} dies", once.gap_s(answer))
            check(cluster.ask(client, prompt(100 + number), NUM_TOKENS), 100 + number)  # a new one, without it
            victim.start()
            wait_until(lambda: is_whole(cluster), "everything is there again")
        wait_until(lambda: moves(cluster, client), "blocks move through Redis again")
        killed = Once(20, lambda: cluster.kill("router-0"))
        check(cluster.ask(client, prompt(200), NUM_TOKENS, killed), 200)  # the journal is kept again
        cluster.start_router("router-0")
        cluster.wait_complete()
        cluster.wait_at_rest()


def is_whole(cluster: FakeCluster) -> bool:
    """Whether every tier, the directory and the journal answer."""
    tiers = [cluster.load(name).tier_is_up for name in cluster.workers]
    states = [cluster.readyz(url) for url in cluster.http_urls]
    return all(all(up.values()) for up in tiers) and not any(state["is_degraded"] for state in states)


def test_a_full_arena_costs_recomputation_and_nothing_else(fake_cluster: MakeCluster) -> None:
    """A prompt of 30 blocks is 120 fragments; the arena holds 50."""
    cluster = fake_cluster(num_slots=50)
    client = cluster.client()
    for number in range(6):
        answer = cluster.ask(client, prompt(number, 120), NUM_TOKENS)
        check(answer, number, 120)
        assert answer.finished is not None
        assert answer.finished.stats.num_recomputed_prompt_tokens > 0
    cluster.wait_at_rest()


def test_a_full_disk_costs_recomputation_and_nothing_else(fake_cluster: MakeCluster, tmp_path: Path) -> None:
    """The tier may have 64 MiB, and its file system has 24: the second segment does not fit beside the first."""
    require(os.geteuid() == 0, "mounting a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path)], check=True)
    try:
        cluster = fake_cluster(num_slots=600, disk_bytes=64 << 20, disk_dir=str(tmp_path))
        client = cluster.client()
        with grpc.insecure_channel(cluster.node.host_address) as channel:
            node = kvnode_pb2_grpc.KVNodeServiceStub(channel)
            for number in itertools.count():
                check(cluster.ask(client, prompt(number, 120), NUM_TOKENS), number, 120)
                disk = node.GetStats(kvnode_pb2.GetStatsRequest()).disk
                if disk.num_refused or disk.num_segments_evicted:
                    break
        assert disk.num_written > 0
        check(cluster.ask(client, prompt(0, 120), NUM_TOKENS), 0, 120)
        cluster.wait_at_rest()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
