"""Random kills, hangs and restarts under 32 streams: no stream breaks, and afterwards nothing is left over."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from switchyard.v1 import kvnode_pb2

from kvstore.config import CALLS_SUFFIX
from kvstore.tiers.host.slot_calls import SlotCalls
from tests.fake_cluster import FakeCluster
from tests.fake_model import VOCAB_SIZE, expected
from tests.processes import KVNode, RedisServer, redis_executable, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.redis]

NUM_STREAMS = 32
SURVIVORS = ("prefill-0", "decode-0", "router-0")  # never killed: what they hold shows what leaks
VICTIMS = ("prefill-1", "decode-1", "decode-2", "router-1", "node-0", "node-1")
WARM_UP_S = 8.0
DISK_BYTES = 32 << 20
KEYS_WITHOUT_TTL = {b"switchyard:control1::epoch", b"switchyard:control1::workers", b"switchyard:control1::blocks"}
SLACK_BYTES, SLACK_FILES = 64 << 20, 16


@dataclass
class Tally:
    """What the clients saw; shared by their threads."""

    num_tokens: int = 0
    num_streams: int = 0
    num_replacements: int = 0
    gaps_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    num_files: int
    rss_bytes: int


def run_streams(cluster: FakeCluster, number: int, end: threading.Event, tally: Tally) -> None:
    """One client: stream after stream, some of which share beginnings."""
    pick = random.Random(number)
    client = cluster.client(number % 2)
    while not end.is_set() and not tally.problems:
        prompt = [(pick.randrange(20) * 131 + i * 17) % VOCAB_SIZE for i in range(pick.randrange(16))]
        prompt += [pick.randrange(VOCAB_SIZE) for _ in range(pick.randrange(1, 60))]
        num_tokens, temperature, seed = pick.randrange(1, 65), pick.choice((0.0, 0.8)), pick.getrandbits(40)
        try:
            answer = cluster.ask(client, prompt, num_tokens, temperature=temperature, seed=seed)
            assert answer.ids == expected(prompt, num_tokens, temperature, seed), "other tokens"
        except Exception as error:
            tally.problems.append(f"{type(error).__name__}: {error} (prompt {prompt}, {num_tokens} tokens)")
            return
        assert answer.finished is not None
        tally.num_streams += 1
        tally.num_tokens += num_tokens
        tally.num_replacements += answer.finished.stats.num_replacements
        tally.gaps_s.append(answer.longest_gap_s)


def make_trouble(cluster: FakeCluster, pick: random.Random, until_s: float, done: Counter[str]) -> None:
    """Kills and starts again, or stops and lets go on, one process after the other."""
    while time.monotonic() < until_s:
        time.sleep(pick.uniform(0.1, 0.8))
        name = pick.choice(VICTIMS)
        if pick.random() < 0.2:
            name = pick.choice(list(cluster.workers))
            cluster.workers[name].signal(signal.SIGSTOP)
            time.sleep(pick.choice((0.2, 2.0)))  # within what is taken for silence, and beyond
            cluster.workers[name].signal(signal.SIGCONT)
            done["hangs"] += 1
            continue
        cluster.kill(name)
        time.sleep(pick.choice((0.0, 0.3)))
        cluster.restart(name)
        done[name] += 1


def footprints(cluster: FakeCluster) -> dict[str, Footprint]:
    """Of those that live all the time."""
    found = {}
    for name in SURVIVORS:
        process = psutil.Process(cluster.server(name).pid)
        found[name] = Footprint(process.num_fds(), process.memory_info().rss)
    return found


def num_reservable(node: KVNode) -> int:
    """Slots of an arena that can be had: all, unless one got lost. What is reserved here can be evicted again."""
    with closing(SlotCalls(node.host_address + CALLS_SUFFIX)) as calls:
        keys = [random.randbytes(22) for _ in range(node.num_slots)]
        reply = calls.reserve(kvnode_pb2.ReserveRequest(keys=keys))
        got = [(k, s, g) for k, s, g in zip(keys, reply.slots, reply.generations, strict=True) if s >= 0]
        sealed = kvnode_pb2.SealRequest(
            keys=[k for k, _, _ in got], slots=[s for _, s, _ in got], generations=[g for _, _, g in got]
        )
        assert calls.seal(sealed).num_sealed == len(got)
        return len({s for _, s, _ in got})


def iter_batches(keys: Iterator[bytes]) -> Iterator[list[bytes]]:
    """A thousand at a time: half an hour leaves hundreds of thousands."""
    while batch := list(itertools.islice(keys, 1000)):
        yield batch


def check_redis(server: RedisServer) -> None:
    """Whatever is there goes away by itself, or is one of a few that do not grow."""
    with server.client() as client:
        eternal: set[bytes] = set()
        for keys in iter_batches(client.scan_iter(count=1000)):
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.ttl(key)
            eternal |= {key for key, ttl_s in zip(keys, pipeline.execute(), strict=True) if ttl_s == -1}
        assert eternal <= KEYS_WITHOUT_TTL, eternal - KEYS_WITHOUT_TTL
        assert client.scard(b"switchyard:control1::workers") < 100


@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(20, marks=pytest.mark.timeout(600)),
        pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(1800, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_no_stream_breaks_and_nothing_is_left_over(
    fake_cluster: Callable[..., FakeCluster],
    redis_server: RedisServer,
    measured: Callable[[str, float], None],
    duration_s: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    executable = redis_executable()
    assert executable is not None
    tally, trouble, end = Tally(), Counter[str](), threading.Event()
    with ExitStack() as stack:
        control = RedisServer(executable)
        stack.callback(control.kill)
        cluster = fake_cluster(
            decode=3,
            hosts=2,
            peers=True,
            disk_bytes=DISK_BYTES,
            num_slots=2048,
            step_s=0.03,
            token_s=0.0002,
            tier=redis_server.url,
            control=control.url,
            journal=control.url,
        )
        stack.callback(end.set)
        threads = stack.enter_context(ThreadPoolExecutor(NUM_STREAMS))
        running = [threads.submit(run_streams, cluster, n, end, tally) for n in range(NUM_STREAMS)]
        time.sleep(WARM_UP_S)
        before = footprints(cluster)
        make_trouble(cluster, random.Random(duration_s), time.monotonic() + duration_s, trouble)
        end.set()
        for client in running:
            client.result()
        assert not tally.problems, tally.problems[0]
        cluster.wait_complete()
        cluster.wait_at_rest()
        check_footprints(before, footprints(cluster))
        for node in cluster.nodes:
            wait_until(lambda node=node: num_reservable(node) == node.num_slots, "no slot of the arena is lost")
            assert [path.name for path in node.arena.parent.glob(f"*{node.node_id}*")] == [node.arena.name]
            segments = Path(f"{cluster.folder}/disk-{cluster.nodes.index(node)}").glob("*.segment")
            assert 0 < sum(path.stat().st_size for path in segments) <= DISK_BYTES
        for server in (control, redis_server):
            check_redis(server)
    for gap_s in tally.gaps_s:
        measured(f"longest pause of each stream in {duration_s} s of churn", gap_s)
    with capsys.disabled():
        print(
            f"\n{tally.num_streams} streams, {tally.num_tokens} tokens, {tally.num_replacements} placed anew; {trouble}"
        )


def check_footprints(before: dict[str, Footprint], after: dict[str, Footprint]) -> None:
    """Neither open files nor memory have grown, but for some slack."""
    for name, held in after.items():
        assert held.num_files <= before[name].num_files + SLACK_FILES, f"{name}: {before[name]}, then {held}"
        assert held.rss_bytes <= before[name].rss_bytes + SLACK_BYTES, f"{name}: {before[name]}, then {held}"
