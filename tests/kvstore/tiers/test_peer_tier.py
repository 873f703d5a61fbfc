"""Fragments pulled from another host's node process: damaged on the way, stale, forged, from peers that go or hang."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.control.directory import MemoryDirectory
from kvstore.control.remote_directory import RemoteDirectory
from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.buffers import CopyBuffers
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import GENERATION_OFFSET, HEADER_BYTES
from kvstore.node.node_slots import NodeSlots
from kvstore.node.peer_server import PeerServer
from kvstore.tiers.host.arena import create_arena
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.host.slot_table import SlotTable
from kvstore.tiers.peers.peer_tier import PeerTier
from kvstore.tiers.peers.peer_wire import GROUP_BYTES, HEAD_BYTES, HELLO_BYTES, TRAILER_BYTES, table_bytes
from kvstore.tiers.peers.tcp_transport import TcpTransport
from tests.kvstore.fragments import SECRET, keys_of, make_fragments, sealed_copy
from tests.kvstore.node.test_node_disk import stats_of
from tests.processes import REPOSITORY, KVNode, free_port, python_environment, wait_until

SEALED_BYTES = HEADER_BYTES + 1000


@pytest.fixture
def host(peer_node: KVNode) -> Iterator[HostTier]:
    """Of the host that is pulled from."""
    tier = HostTier(peer_node.host_address)
    yield tier
    tier.close()


@pytest.fixture
def directory() -> MemoryDirectory:
    return MemoryDirectory(time.monotonic)


@pytest.fixture
def peer(directory: MemoryDirectory) -> Iterator[PeerTier]:
    tier = PeerTier(directory, SECRET, lambda: "")
    yield tier
    tier.close()


def publish(directory: MemoryDirectory, fragments: Sequence[Fragment], *addresses: str) -> None:
    for address in addresses:
        directory.publish([fragment.key[:16] for fragment in fragments], f"peer:{address}")


Damage = Callable[..., str]


@pytest.fixture
def damage(host: HostTier) -> Iterator[Damage]:
    """Starts a proxy before the node, for answers of `count` fragments; its address."""
    processes: list[subprocess.Popen[str]] = []

    def damage(count: int, *edits: dict[str, object]) -> str:
        hold = body_offset(count) + count * (SEALED_BYTES + TRAILER_BYTES)
        plan = json.dumps({"hold": hold, "edits": edits})
        command = [sys.executable, "-m", "tests.kvstore.damaging_proxy", host.peer_address, plan]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=python_environment())
        processes.append(process)
        assert process.stdout is not None
        return f"127.0.0.1:{process.stdout.readline().strip()}"

    yield damage
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def body_offset(count: int) -> int:
    """Where the first fragment begins in what a peer sends for `count` keys."""
    return HELLO_BYTES + HEAD_BYTES + table_bytes(count)


def test_blocks_are_found_by_the_directory(host: HostTier, peer: PeerTier, directory: MemoryDirectory) -> None:
    known, unknown = make_fragments(3), make_fragments(3)
    host.store(known + unknown)
    publish(directory, known, host.peer_address)
    assert peer.load(keys_of(unknown + known)) == [None] * 3 + [fragment.payload for fragment in known]


def test_the_own_host_is_not_asked(host: HostTier, directory: MemoryDirectory) -> None:
    peer = PeerTier(directory, SECRET, lambda: host.peer_address)
    fragments = make_fragments(1)
    host.store(fragments)
    publish(directory, fragments, host.peer_address)
    assert peer.load(keys_of(fragments)) == [None]
    peer.close()


@pytest.mark.parametrize("num_connections", [1, 3])
def test_many_fragments_over_several_connections(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, num_connections: int
) -> None:
    peer._num_connections = num_connections  # else it depends on the machine
    fragments = make_fragments(200, 60_000)
    assert host.store(fragments) == [True] * 200
    publish(directory, fragments, host.peer_address)
    for _ in range(3):
        assert peer.load(keys_of(fragments)) == [fragment.payload for fragment in fragments]


def forge(fragment: Fragment) -> str:
    """Edits cannot know the slot's generation, so only the payload and its checksum are replaced."""
    sealed = sealed_copy(Fragment(fragment.key, memoryview(bytes(1000))))
    return bytes(sealed[16:]).hex()


FAULTS: dict[str, tuple[Callable[[list[Fragment], int], dict[str, object]], str]] = {
    "flip": (lambda _, at: {"at": at + HEADER_BYTES + 500, "xor": 4}, "checksum"),
    "checksum": (lambda _, at: {"at": at + 24, "xor": 1}, "checksum"),
    "key": (lambda _, at: {"at": at + 50, "xor": 1}, "stale"),
    "generation": (lambda _, at: {"at": at + GENERATION_OFFSET, "xor": 1}, "stale"),
    "magic": (lambda _, at: {"at": at, "xor": 1}, "layout"),
    "length": (lambda _, at: {"at": at + 17, "xor": 1}, "truncated"),
    "forged": (lambda fragments, at: {"at": at + 16, "replace": forge(fragments[1])}, "forged"),
    "tag": (lambda _, at: {"at": at + 2 * SEALED_BYTES + TRAILER_BYTES + 5, "xor": 1}, "forged"),
    "status": (lambda _, at: {"at": at + 2 * SEALED_BYTES + TRAILER_BYTES, "xor": 1}, "stale"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_on_its_way_is_refused_once(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, damage: Damage, fault: str
) -> None:
    fragments = make_fragments(3)
    host.store(fragments)
    make_edit, reason = FAULTS[fault]
    address = damage(3, make_edit(fragments, body_offset(3) + SEALED_BYTES))
    publish(directory, fragments, address)
    good = [fragment.payload for fragment in fragments]
    assert peer.load(keys_of(fragments)) == [good[0], Rejected(reason), good[2]]  # type: ignore[arg-type]
    assert peer.load(keys_of(fragments)) == good  # the peer's own copy was good, and stayed


def test_swapped_fragments_are_refused(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, damage: Damage
) -> None:
    fragments = make_fragments(3)
    host.store(fragments)
    first = body_offset(3)
    publish(directory, fragments, damage(3, {"at": first, "swap": [first + 2 * SEALED_BYTES, SEALED_BYTES]}))
    assert peer.load(keys_of(fragments)) == [Rejected("stale"), fragments[1].payload, Rejected("stale")]


@pytest.mark.parametrize("end", ["cut", "stall"])
def test_a_peer_that_stops_halfway_costs_what_it_announced_and_is_left_alone(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, damage: Damage, end: str
) -> None:
    fragments = make_fragments(3)
    host.store(fragments)
    publish(directory, fragments, damage(3, {"at": body_offset(3) + SEALED_BYTES + 100, end: True}))
    assert peer.load(keys_of(fragments)) == [Rejected("truncated")] * 3
    assert peer.load(keys_of(fragments)) == [None] * 3
    assert peer.is_up
    publish(directory, fragments, host.peer_address)
    assert peer.load(keys_of(fragments)) == [fragment.payload for fragment in fragments]  # of another peer


@pytest.mark.parametrize(
    "edit",
    [
        {"at": 0, "xor": 1},  # the hello's magic
        {"at": 10, "stall": True},
        {"at": HELLO_BYTES, "xor": 1},  # the table's magic
        {"at": HELLO_BYTES + 8, "xor": 1},  # its sequence
        {"at": HELLO_BYTES + 20, "xor": 2},  # its number of keys
        {"at": HELLO_BYTES + 23, "xor": 255},
        {"at": HELLO_BYTES + HEAD_BYTES + 3, "xor": 255},  # a fragment of 4 GB
        {"at": HELLO_BYTES + HEAD_BYTES, "replace": "0100"},  # one shorter than its header
        {"at": HELLO_BYTES + HEAD_BYTES, "replace": "0000"},  # a reason that there is not
        {"at": HELLO_BYTES + HEAD_BYTES + 5, "cut": True},
    ],
    ids=lambda edit: json.dumps(edit),
)
def test_what_does_not_fit_ends_the_connection(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, damage: Damage, edit: dict[str, object]
) -> None:
    fragments = make_fragments(3)
    host.store(fragments)
    publish(directory, fragments, damage(3, edit))
    assert peer.load(keys_of(fragments)) == [None] * 3
    publish(directory, fragments, host.peer_address)
    assert peer.load(keys_of(fragments)) == [fragment.payload for fragment in fragments]


def test_bytes_that_the_peer_holds_damaged_are_refused_and_forgotten_there(
    peer: PeerTier, directory: MemoryDirectory, peer_node: KVNode, host: HostTier
) -> None:
    good, bad = make_fragments(2)
    host.store([good, bad])
    publish(directory, [good, bad], host.peer_address)
    before = dict(stats_of(peer_node).rejected).get("checksum", 0)
    offset = peer_node.arena.read_bytes().index(bad.payload)
    with open(peer_node.arena, "r+b") as file:
        file.seek(offset)
        file.write(bytes([bad.payload[0] ^ 1]))
    assert peer.load([good.key, bad.key]) == [good.payload, Rejected("checksum")]
    assert peer.load([good.key, bad.key]) == [good.payload, None]
    assert stats_of(peer_node).rejected["checksum"] == before + 1


def test_a_stranger_gets_no_answer(host: HostTier, directory: MemoryDirectory) -> None:
    fragments = make_fragments(1)
    host.store(fragments)
    publish(directory, fragments, host.peer_address)
    stranger = PeerTier(directory, "a guess", lambda: "")
    assert stranger.load(keys_of(fragments)) == [None]
    stranger.close()


def test_nobody_listens(peer: PeerTier, directory: MemoryDirectory, host: HostTier) -> None:
    fragments = make_fragments(2)
    publish(directory, fragments, f"127.0.0.1:{free_port()}", "nonsense", "host:99999999", "a..b:1", ":1")
    for _ in range(7):
        assert peer.load(keys_of(fragments)) == [None] * 2
    host.store(fragments)
    publish(directory, fragments, host.peer_address)
    assert peer.load(keys_of(fragments)) == [fragment.payload for fragment in fragments]


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_a_peer_that_was_replaced_is_dialled_anew(peer: PeerTier, directory: MemoryDirectory, address: str) -> None:
    options = {"peer_address": f"{address}:{free_port()}"}
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", options=options, secret=SECRET)
    host = HostTier(node.host_address)
    fragments = make_fragments(3)
    host.store(fragments)
    publish(directory, fragments, options["peer_address"])
    assert peer.load(keys_of(fragments)) == [fragment.payload for fragment in fragments]
    node.restart()
    wait_until(lambda: host.store(fragments) == [True] * 3, "fragments are in the new arena")
    assert peer.load(keys_of(fragments)) == [fragment.payload for fragment in fragments]
    host.close()
    node.close()


def test_what_only_the_peers_disk_has_comes_too(peer: PeerTier, directory: MemoryDirectory, tmp_path: Path) -> None:
    store = {"disk_dir": str(tmp_path / "disk"), "disk_bytes": 16 << 20, "disk_write": "through"}
    options = {"peer_address": "127.0.0.1:0", "kvstore": store}
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", num_slots=16, options=options, secret=SECRET)
    host = HostTier(node.host_address)
    fragments = make_fragments(4)
    host.store(fragments)
    publish(directory, fragments, host.peer_address)
    wait_until(lambda: stats_of(node).disk.num_written == 4, "all are on disk")
    host.store(make_fragments(16))
    assert peer.load(keys_of(fragments)) == [fragment.payload for fragment in fragments]
    assert stats_of(node).num_promoted == 4
    host.close()
    node.close()


def test_without_its_directory_the_tier_is_down(kv_node: KVNode) -> None:
    peer = PeerTier(RemoteDirectory(kv_node.control_address), SECRET, lambda: "")
    fragments = make_fragments(1)
    assert peer.is_up
    kv_node.kill()
    assert peer.load(keys_of(fragments)) == [None]
    wait_until(lambda: not peer.is_up, "the tier is down")
    kv_node.start()
    wait_until(lambda: peer.is_up, "the tier is up again")
    peer.close()


def test_slots_that_are_given_away_while_they_are_sent_are_stale(tmp_path: Path) -> None:
    """The other end takes the first group, and the rest after all slots have other fragments."""
    payload_bytes, num_slots = 1 << 20, 32
    owned = create_arena(tmp_path / "test.arena", "test", payload_bytes, num_slots)
    slots = NodeSlots(owned.arena, SlotTable(num_slots, time.monotonic))
    old, new = make_fragments(num_slots, payload_bytes), make_fragments(num_slots, payload_bytes)

    def fill(fragments: Sequence[Fragment]) -> None:
        refs = slots.reserve(keys_of(fragments))
        for fragment, ref in zip(fragments, refs, strict=True):
            owned.arena.write([ref.slot], [fragment], [ref.generation])
        assert slots.seal(keys_of(fragments), refs) == num_slots

    fill(old)
    server = PeerServer("127.0.0.1:0", slots, SECRET)
    transport = TcpTransport(server.address, FragmentAuthenticator(SECRET), CopyBuffers(GROUP_BYTES))
    tier = PeerTier(MemoryDirectory(time.monotonic), SECRET, lambda: "")
    pulling = transport.pull(keys_of(old), time.monotonic() + 60)
    results = [tier._verified(next(pulling)[1], old[0].key)]
    fill(new)
    results += [tier._verified(pulled, old[i].key) for i, pulled in pulling]
    assert results[0] == old[0].payload
    assert results[-1] == Rejected("stale")
    for fragment, result in zip(old, results, strict=True):
        assert isinstance(result, Rejected) or result == fragment.payload
    transport.close()
    tier.close()
    server.close()
    slots.close()
    owned.remove()
