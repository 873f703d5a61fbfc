"""The disk tier behind a node process: what the arena has no slots for comes back from it, through the host tier."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from switchyard.v1 import kvnode_pb2, kvnode_pb2_grpc

from kvstore.format.fragment import Fragment
from kvstore.network.channels import NODE_OPTIONS, dial
from kvstore.tiers.host.host_tier import HostTier
from tests.kvstore.fragments import SECRET, damage_segments, keys_of, make_compressible, make_fragments
from tests.kvstore.node.test_node import start
from tests.processes import KVNode, wait_until

DISK_BYTES = 16 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def start_node(folder: Path) -> Iterator[Callable[..., KVNode]]:
    nodes: list[KVNode] = []

    def start_node(write: str = "back", compression: str = "none") -> KVNode:
        store = {"disk_dir": str(folder), "disk_bytes": DISK_BYTES, "disk_write": write}
        options = {"kvstore": {**store, "disk_compression": compression}}
        nodes.append(KVNode(f"test-{uuid.uuid4().hex[:12]}", 4096, 16, options, SECRET))
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.close()


def stats_of(node: KVNode) -> Any:
    own_connection = ("grpc.use_local_subchannel_pool", 1)  # others' may lead to the node before this one
    with dial(node.host_address, [*NODE_OPTIONS, own_connection]) as channel:
        stub = kvnode_pb2_grpc.KVNodeServiceStub(channel)
        return stub.GetStats(kvnode_pb2.GetStatsRequest(), wait_for_ready=True)


def put_in_small_batches(tier: HostTier, node: KVNode, fragments: list[Fragment]) -> None:
    """As many at a time as the node keeps slots for, and not before what is next to go is on disk."""
    for i in range(0, len(fragments), 4):
        assert all(tier.store(fragments[i : i + 4]))
        due = max(0, i + 4 - 12)
        wait_until(lambda due=due: stats_of(node).disk.num_written >= due, "the oldest are on disk")  # type: ignore[misc]


def test_what_was_evicted_comes_back_from_the_disk(start_node: Callable[[str], KVNode]) -> None:
    node = start_node("back")
    tier = HostTier(node.host_address)
    wait_until(lambda: stats_of(node).disk.is_up, "the disk tier is up")
    fragments = make_fragments(64)
    put_in_small_batches(tier, node, fragments)
    for i in range(0, 64, 4):
        batch = fragments[i : i + 4]
        assert list(tier.load(keys_of(batch))) == [fragment.payload for fragment in batch]
        kept = min(64, 56 + i)  # these pushed others out in turn
        wait_until(lambda kept=kept: stats_of(node).disk.num_fragments >= kept, "the oldest are on disk")  # type: ignore[misc]
    stats = stats_of(node)
    assert stats.num_promoted >= 48
    assert stats.disk.num_read == stats.num_promoted
    assert dict(stats.disk.rejected) == {}
    tier.close()


def test_compressed_fragments_come_back_from_the_disk(start_node: Callable[..., KVNode], folder: Path) -> None:
    node = start_node("through", "zstd")
    tier = HostTier(node.host_address)
    wait_until(lambda: stats_of(node).disk.is_up, "the disk tier is up")
    fragments = make_compressible(48, 4096)  # two pages each, one when compressed
    for i in range(0, 48, 4):
        assert all(tier.store(fragments[i : i + 4]))
        wait_until(lambda i=i: stats_of(node).disk.num_written >= i + 4, "all are on disk")  # type: ignore[misc]
    node.terminate()
    (segment,) = (path for path in folder.glob("*.segment"))
    assert 48 * 4096 < segment.stat().st_size < 48 * 4096 * 1.1
    node.start()
    wait_until(lambda: stats_of(node).disk.num_fragments == 48, "the disk tier is up again")
    wait_until(lambda: tier.is_up, "the host tier is up again")
    for i in range(0, 48, 4):
        assert list(tier.load(keys_of(fragments[i : i + 4]))) == [fragment.payload for fragment in fragments[i : i + 4]]
    assert dict(stats_of(node).disk.rejected) == {}
    tier.close()


def test_a_fragment_is_in_the_arena_once_it_was_read_from_the_disk(start_node: Callable[[str], KVNode]) -> None:
    node = start_node("through")
    tier = HostTier(node.host_address)
    old, new = make_fragments(1), make_fragments(16)
    tier.store(old)
    wait_until(lambda: stats_of(node).disk.num_written == 1, "the first one is on disk")
    tier.store(new)
    for _ in range(3):
        assert list(tier.load(keys_of(old))) == [old[0].payload]
    assert stats_of(node).num_promoted == 1
    tier.close()


def test_a_lookup_larger_than_the_arena_gives_what_fits(start_node: Callable[[str], KVNode]) -> None:
    node = start_node("back")
    tier = HostTier(node.host_address)
    wait_until(lambda: stats_of(node).disk.is_up, "the disk tier is up")
    fragments = make_fragments(64)
    put_in_small_batches(tier, node, fragments)
    got = list(tier.load(keys_of(fragments)))
    assert sum(payload is not None for payload in got) >= 8
    for fragment, payload in zip(fragments, got, strict=True):
        assert payload is None or payload == fragment.payload
    tier.close()


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_written_through_all_survives_the_node(start_node: Callable[[str], KVNode], end: str) -> None:
    node = start_node("through")
    tier = HostTier(node.host_address)
    fragments = make_fragments(8)
    assert tier.store(fragments) == [True] * 8
    wait_until(lambda: stats_of(node).disk.num_written == 8, "all are on disk")
    getattr(node, end)()
    node.start()
    wait_until(lambda: tier.is_up and stats_of(node).disk.is_up, "the tiers are up")
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    assert stats_of(node).num_promoted == 8
    tier.close()


def test_damaged_fragments_on_disk_are_misses_and_counted(start_node: Callable[[str], KVNode], folder: Path) -> None:
    node = start_node("through")
    tier = HostTier(node.host_address)
    good, bad = make_fragments(2)
    tier.store([good, bad])
    wait_until(lambda: stats_of(node).disk.num_written == 2, "both are on disk")
    damage_segments(folder, bad, lambda stored: stored[:100] + bytes([stored[100] ^ 1]) + stored[101:])
    tier.store(make_fragments(16))
    assert list(tier.load([good.key, bad.key])) == [good.payload, None]
    assert dict(stats_of(node).disk.rejected) == {"checksum": 1}
    tier.store([bad])
    assert list(tier.load([bad.key])) == [bad.payload]
    tier.close()


def test_damaged_slots_do_not_reach_the_disk(start_node: Callable[[str], KVNode]) -> None:
    node = start_node("back")
    tier = HostTier(node.host_address)
    fragments = make_fragments(12)  # none is next to go yet
    tier.store(fragments)
    offset = node.arena.read_bytes().index(fragments[0].payload)
    with open(node.arena, "r+b") as file:
        file.seek(offset)
        file.write(bytes([fragments[0].payload[0] ^ 1]))
    tier.store(make_fragments(2))
    wait_until(lambda: stats_of(node).disk.num_written == 1, "the second one is on disk")
    assert dict(stats_of(node).rejected) == {"checksum": 1}
    assert list(tier.load([fragments[0].key])) == [None]
    tier.close()


def test_two_nodes_do_not_share_a_folder(start_node: Callable[[str], KVNode]) -> None:
    first, second = start_node("through"), start_node("through")
    wait_until(lambda: stats_of(first).disk.is_up, "the first node has the folder")
    assert not stats_of(second).disk.is_up
    tier = HostTier(second.host_address)
    fragments = make_fragments(3)
    assert tier.store(fragments) == [True] * 3  # in its arena
    assert list(tier.load(keys_of(fragments))) == [fragment.payload for fragment in fragments]
    first.kill()
    wait_until(lambda: stats_of(second).disk.is_up, "the second node has the folder")
    tier.close()


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (
            {"kvstore": {"disk_dir": "/nowhere", "disk_bytes": DISK_BYTES}},
            2,
            "secret: needed where there is a disk tier",
        ),
        ({"kvstore": {"disk_dir": "/nowhere", "disk_bytes": 1000}}, 2, "kvstore.disk_bytes: must be 0 or at least"),
        (
            {"kvstore": {"disk_dir": "/nowhere", "disk_bytes": DISK_BYTES}, "secret": SECRET, "slot_bytes": 64 << 20},
            1,
            "disk_bytes: must be at",
        ),
    ],
)
def test_a_disk_tier_that_cannot_be_is_one_line(
    kv_node: KVNode, tmp_path: Path, changed: dict[str, object], code: int, message: str
) -> None:
    changed = {"node_id": "other", "arena": str(tmp_path / "other.arena"), "num_slots": 1, **changed}
    result = start(tmp_path, {**kv_node.spec(), "host_address": f"unix:{tmp_path}/s", **changed})
    assert result.returncode == code
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert SECRET not in result.stderr
