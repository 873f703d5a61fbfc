"""How fast fragments are handed from one worker to another, beside what this machine's memory and sockets can do.

All figures of a run come from the same process and the same minutes. KV transfer is what it is in service: put with its
checksum, then get with copy and verification. Knows nothing of where rows are kept.
"""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlsplit

from kvstore.config import NodeSpec
from kvstore.control.directory import MemoryDirectory
from kvstore.format.fragment import Fragment
from kvstore.names import NAME_BYTES, fragment_key
from kvstore.network.addresses import listen
from kvstore.redis_client import connect
from kvstore.tiers.host.arena import arena_path
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.peers.peer_tier import PEER_LOCATION, PeerTier
from kvstore.tiers.redis.redis_tier import RedisTier
from kvstore.tiers.tier import Tier
from settings.loading import write

_REDIS_TTL_S = 60.0  # what a benchmark leaves in a Redis is gone a minute later
_SECRET = "a benchmark's"
_NODE_START_S = 60.0
_BENCHMARK_REQUESTS = 1000  # of redis-benchmark; with few it says that it took no time
_BENCHMARK_CONNECTIONS = (1, 4, 50)  # 50 is its own default
_REDIS_WARM_UP_RUNS = 4  # until a Redis of 256 MiB is full: later runs evict, as in service
_REDIS_PAIRS = {"put": "set", "get": "get"}  # and what redis-benchmark calls it
_REDIS_CHUNK_BYTES = 4 * 1024 * 1024  # of plain commands


@dataclass(frozen=True, slots=True)
class BandwidthRow:
    """One measured quantity. Gigabytes are 10^9 bytes of payload."""

    name: str
    """memcpy, loopback_tcp, redis_set, redis_mget, redis_benchmark_set, redis_benchmark_get, or TIER_put, TIER_get,
    TIER_kv_transfer (put, then get); two_hosts_tcp, two_hosts_peer_get: between network namespaces."""
    num_bytes: int
    """Payload of one run."""
    fragment_bytes: int
    num_runs: int
    median_gb_per_s: float
    best_gb_per_s: float
    worst_gb_per_s: float


@dataclass(frozen=True, slots=True)
class BenchShape:
    """How much is moved: a batch of fragments, several times."""

    fragment_bytes: int = 256 * 1024
    num_fragments: int = 256
    num_runs: int = 9

    @property
    def num_bytes(self) -> int:
        """Payload of one run."""
        return self.fragment_bytes * self.num_fragments


@dataclass(frozen=True, slots=True)
class ShareRow:
    """How much of another's rate was reached, in each of the runs that were made in turn with the other's."""

    name: str
    """redis_put_share, redis_get_share."""
    of: str
    """The other."""
    runs: Sequence[float]


@dataclass(frozen=True, slots=True)
class KVTransferFigures:
    """What measure_kv_transfer() measures."""

    rows: Sequence[BandwidthRow]
    shares: Sequence[ShareRow]


class BenchFailed(Exception):
    """A fragment was lost or refused, so the figures would not be those of a KV transfer."""


def measure_kv_transfer(arena_dir: str, redis_url: str, shape: BenchShape) -> KVTransferFigures:
    """All rows: memcpy, loopback TCP, the host and peer tiers of a node process started for this; the same between two
    network namespaces where this process may make them; and, if there is a URL, Redis by its own benchmark, by plain
    commands and as a tier."""
    rows = [measure_memcpy(shape), measure_tcp(shape)]
    with node_process(arena_dir, shape) as host_address:
        rows += _measure_and_close(HostTier(host_address), shape)
        rows.append(measure_peer(host_address, shape))
    if can_make_hosts():
        with second_host() as other, node_process(arena_dir, shape, other) as host_address:
            rows.append(measure_tcp(shape, other))
            rows.append(measure_peer(host_address, shape, other))
    if redis_url:
        figures = measure_redis(redis_url, shape)
        return KVTransferFigures([*rows, *measure_redis_commands(redis_url, shape), *figures.rows], figures.shares)
    return KVTransferFigures(rows, [])


@dataclass(frozen=True, slots=True)
class OtherHost:
    """Where a process runs, and how it and this one reach each other."""

    enter: tuple[str, ...] = ()
    """Before a command that is to run there."""
    address: str = "127.0.0.1"
    own_address: str = "127.0.0.1"
    """Of this process, as seen from there."""


HERE = OtherHost()


def can_make_hosts() -> bool:
    """Network namespaces need a few tools, and more rights than root has in some containers."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter")):
        return False
    return subprocess.run(["unshare", "--net", "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0


@contextmanager
def second_host() -> Iterator[OtherHost]:
    """A network namespace with a wire to this one, in the range that is set aside for benchmarks (RFC 2544)."""
    command = ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise BenchFailed("no network namespace could be made")
        enter = ("nsenter", "-t", str(process.pid), "--net", "--")
        wire = f"sybench{process.pid}"
        other = OtherHost(enter, f"198.18.{process.pid % 250}.2", f"198.18.{process.pid % 250}.1")
        for step in (
            f"ip link add {wire} type veth peer name wire netns {process.pid}",
            f"ip address add {other.own_address}/24 dev {wire}",
            f"ip link set {wire} up",
            f"{' '.join(enter)} ip address add {other.address}/24 dev wire",
            f"{' '.join(enter)} ip link set wire up",
        ):
            subprocess.run(step.split(), check=True)
        yield other
    finally:
        process.kill()
        process.wait(_NODE_START_S)


def measure_memcpy(shape: BenchShape) -> BandwidthRow:
    """Copies between two buffers that are mapped already, in pieces of a fragment."""
    source, target = memoryview(os.urandom(shape.num_bytes)), memoryview(bytearray(shape.num_bytes))

    def copy() -> None:
        for start in range(0, shape.num_bytes, shape.fragment_bytes):
            target[start : start + shape.fragment_bytes] = source[start : start + shape.fragment_bytes]

    copy()
    return _row("memcpy", shape, [_seconds(copy) for _ in range(shape.num_runs)])


_SENDER = """
import os, socket, sys
payload = os.urandom(int(sys.argv[3]))
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as receiver:
    while receiver.recv(1):
        receiver.sendall(payload)
"""


def measure_tcp(shape: BenchShape, other: OtherHost = HERE) -> BandwidthRow:
    """A process there sends, on request, into a buffer that is mapped already here."""
    target = memoryview(bytearray(shape.num_bytes))
    with listen(other.own_address, 0, backlog=1) as server:
        server.settimeout(_NODE_START_S)
        port = server.getsockname()[1]
        command = [*other.enter, sys.executable, "-P", "-c", _SENDER]
        command += [other.own_address, str(port), str(shape.num_bytes)]
        sender = subprocess.Popen(command)
        receiver, _ = server.accept()

    def transfer() -> None:
        receiver.sendall(b"?")
        num_received = 0
        while num_received < shape.num_bytes:
            count = receiver.recv_into(target[num_received:])
            if count == 0:
                raise BenchFailed("the sending process ended")
            num_received += count

    try:
        with receiver:
            transfer()
            name = "loopback_tcp" if other is HERE else "two_hosts_tcp"
            return _row(name, shape, [_seconds(transfer) for _ in range(shape.num_runs)])
    finally:
        sender.wait(_NODE_START_S)


def measure_peer(host_address: str, shape: BenchShape, other: OtherHost = HERE) -> BandwidthRow:
    """Fragments pulled by TCP from a node process's arena, tags made and everything verified."""
    host = HostTier(host_address)
    directory = MemoryDirectory(time.monotonic)
    peer = PeerTier(directory, _SECRET, lambda: "")
    payload = memoryview(os.urandom(shape.num_bytes))
    gets: list[float] = []
    try:
        for _ in range(shape.num_runs + 1):
            fragments = _fragments(payload, shape)
            _must_store(host, fragments)
            directory.publish([fragments[0].key[:NAME_BYTES]], PEER_LOCATION + host.peer_address)
            keys = [fragment.key for fragment in fragments]
            gets.append(_seconds(lambda keys=keys: _must_load(peer, keys)))  # type: ignore[misc]
    finally:
        peer.close()
        host.close()
    name = "peer_get" if other is HERE else "two_hosts_peer_get"
    return _row(name, shape, gets[1:])  # the first one connects


def measure_redis(url: str, shape: BenchShape) -> KVTransferFigures:
    """A tier in the Redis and, where there is one, redis-benchmark: in turn, so that both see the same minutes.

    Every value has a key of its own, redis-benchmark's have one together, which keeps them in the processor's caches.
    """
    payload = memoryview(os.urandom(shape.num_bytes))
    runs: list[dict[str, float]] = []
    tier = RedisTier(url, _SECRET, _REDIS_TTL_S)
    try:
        connections = _fastest_connections(url, shape)
        for _ in range(_REDIS_WARM_UP_RUNS + shape.num_runs):
            fragments = _fragments(payload, shape)
            keys = [fragment.key for fragment in fragments]
            run: dict[str, float] = {}
            for name, command in _REDIS_PAIRS.items():
                if connections:
                    run[f"benchmark_{command}"] = _benchmark_seconds(url, shape, command, connections[command])
                put, get = partial(_must_store, tier, fragments), partial(_must_load, tier, keys)
                run[name] = _seconds(put if name == "put" else get)
            runs.append({**run, "kv_transfer": run["put"] + run["get"]})
    finally:
        tier.close()
    counted = runs[_REDIS_WARM_UP_RUNS:]
    rows = [_row(f"redis_{name}", shape, [run[name] for run in counted]) for name in counted[0]]
    shares = [
        ShareRow(f"redis_{name}_share", "redis-benchmark", [run[f"benchmark_{command}"] / run[name] for run in counted])
        for name, command in _REDIS_PAIRS.items()
        if connections
    ]
    return KVTransferFigures(rows, shares)


def _fastest_connections(url: str, shape: BenchShape) -> dict[str, int]:
    """How many of redis-benchmark's connections are fastest on this machine, by command; empty: it is not there."""
    if shutil.which("redis-benchmark") is None:
        return {}
    fastest: dict[str, int] = {}
    for command in _REDIS_PAIRS.values():
        tried = {
            connections: statistics.median(_benchmark_seconds(url, shape, command, connections) for _ in range(3))
            for connections in _BENCHMARK_CONNECTIONS
        }
        fastest[command] = min(tried, key=lambda connections: tried[connections])
    return fastest


def _benchmark_seconds(url: str, shape: BenchShape, command: str, connections: int) -> float:
    """What a batch takes at the rate that redis-benchmark reaches with values of a fragment's size."""
    address = urlsplit(url)
    line = ["redis-benchmark", "-h", str(address.hostname), "-p", str(address.port), "-t", command, "--csv"]
    line += ["-d", str(shape.fragment_bytes), "-n", str(_BENCHMARK_REQUESTS), "-c", str(connections)]
    said = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout
    for row in csv.reader(said.splitlines()):
        if row[0].lower() == command:
            return shape.num_fragments / float(row[1])
    raise BenchFailed(f"redis-benchmark said nothing of {command}")


def measure_redis_commands(url: str, shape: BenchShape) -> list[BandwidthRow]:
    """SET and MGET of values of a fragment's size by a client library, nothing made or verified."""
    client = connect(url)
    prefix, value = f"bench:{os.urandom(8).hex()}:", os.urandom(shape.fragment_bytes)
    keys = [f"{prefix}{i}" for i in range(shape.num_fragments)]
    size = max(1, _REDIS_CHUNK_BYTES // shape.fragment_bytes)
    chunks = [keys[i : i + size] for i in range(0, len(keys), size)]

    def put() -> None:
        for chunk in chunks:
            pipeline = client.pipeline(transaction=False)
            for key in chunk:
                pipeline.set(key, value, ex=int(_REDIS_TTL_S))
            pipeline.execute()

    def get() -> None:
        for chunk in chunks:
            client.mget(chunk)

    try:
        put()
        puts = [_seconds(put) for _ in range(shape.num_runs)]
        gets = [_seconds(get) for _ in range(shape.num_runs)]
    finally:
        client.close()
    return [_row("redis_set", shape, puts), _row("redis_mget", shape, gets)]


def measure_tier(tier: Tier, shape: BenchShape) -> list[BandwidthRow]:
    """Store (put), load (get) and both together, every run with fragments that the tier has not seen."""
    payload = memoryview(os.urandom(shape.num_bytes))
    puts: list[float] = []
    gets: list[float] = []
    for run in range(shape.num_runs + 1):
        fragments = _fragments(payload, shape)
        keys = [fragment.key for fragment in fragments]
        put_s = _seconds(lambda fragments=fragments: _must_store(tier, fragments))  # type: ignore[misc]
        get_s = _seconds(lambda keys=keys: _must_load(tier, keys))  # type: ignore[misc]
        if run > 0:  # the first one warms up connections and buffers
            puts.append(put_s)
            gets.append(get_s)
    both = [put_s + get_s for put_s, get_s in zip(puts, gets, strict=True)]
    named = {"put": puts, "get": gets, "kv_transfer": both}
    return [_row(f"{tier.name}_{name}", shape, seconds) for name, seconds in named.items()]


def _measure_and_close(tier: Tier, shape: BenchShape) -> list[BandwidthRow]:
    try:
        return measure_tier(tier, shape)
    finally:
        tier.close()


def _must_store(tier: Tier, fragments: Sequence[Fragment]) -> None:
    if not all(tier.store(fragments)):
        raise BenchFailed(f"the {tier.name} tier did not keep every fragment")


def _must_load(tier: Tier, keys: Sequence[bytes]) -> None:
    if not all(isinstance(payload, memoryview) for payload in tier.load(keys)):
        raise BenchFailed(f"the {tier.name} tier did not give back every fragment")


def _fragments(payload: memoryview, shape: BenchShape) -> list[Fragment]:
    name, size = os.urandom(16), shape.fragment_bytes
    return [
        Fragment(fragment_key(name, i, 1, 0), payload[i * size : (i + 1) * size]) for i in range(shape.num_fragments)
    ]


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _row(name: str, shape: BenchShape, seconds: Sequence[float]) -> BandwidthRow:
    rates = sorted(shape.num_bytes / run_s / 1e9 for run_s in seconds)
    return BandwidthRow(
        name=name,
        num_bytes=shape.num_bytes,
        fragment_bytes=shape.fragment_bytes,
        num_runs=len(rates),
        median_gb_per_s=statistics.median(rates),
        best_gb_per_s=rates[-1],
        worst_gb_per_s=rates[0],
    )


@contextmanager
def node_process(arena_dir: str, shape: BenchShape, other: OtherHost = HERE) -> Iterator[str]:
    """A node process whose arena holds two batches, so that later runs evict, as in service; its host address."""
    node_id = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        sizes = (shape.fragment_bytes, 2 * shape.num_fragments)
        spec = NodeSpec(node_id, arena_path(arena_dir, node_id), *sizes, f"unix:{folder}/host.sock", secret=_SECRET)
        spec = replace(spec, peer_address=f"{other.address}:0")
        write(f"{folder}/spec.json", spec)
        command = [*other.enter, sys.executable, "-P", "-m", "kvstore.node", "--spec", f"{folder}/spec.json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise BenchFailed("the node process did not start")
            yield json.loads(line)["host_address"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_NODE_START_S)
