"""Fragments read from the memory of another node process by NIXL, and what is said where that is not installed."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.config import KVStoreConfig
from kvstore.connect import open_tiers
from kvstore.control.directory import MemoryDirectory
from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.fragment import Fragment, Rejected, RejectReason
from kvstore.node.node_slots import NodeSlots
from kvstore.node.peer_server import PeerServer
from kvstore.tiers.host.arena import create_arena
from kvstore.tiers.host.host_tier import HostTier
from kvstore.tiers.host.slot_table import SlotTable
from kvstore.tiers.peers.peer_channel import Bodies, PeerChannel
from kvstore.tiers.peers.peer_tier import PeerTier
from kvstore.tiers.peers.peer_wire import (
    DESCRIPTION_HEAD_BYTES,
    GROUP_BYTES,
    HEAD_BYTES,
    HELLO_BYTES,
    PULL,
    READ,
    TRAILER_BYTES,
    TableEntry,
    address_bytes,
    table_bytes,
)
from tests.kvstore.fragments import SECRET, keys_of, make_fragments
from tests.kvstore.node.test_node_disk import stats_of
from tests.kvstore.tiers.test_peer_tier import publish
from tests.processes import REPOSITORY, KVNode, free_port, python_environment, wait_until

SLOT_BYTES = 64 * 1024


# ------------------------------------------------------------------------------------------------ where it is not there


def test_the_setting_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^peer_transport: must be one of tcp, nixl, not 'carrier pigeon'"):
        KVStoreConfig(peer_transport="carrier pigeon")
    monkeypatch.setitem(sys.modules, "nixl", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"^peer_transport: nixl needs the nixl package"):
        KVStoreConfig(peer_transport="nixl")


@pytest.mark.parametrize(
    ("program", "arguments", "field"),
    [
        ("kvstore.node", [], "kvstore.peer_transport: "),
        ("deploy.cli", ["serve", "--set", "kvstore.peer_transport=nixl"], "kvstore.peer_transport: "),
    ],
)
def test_without_the_package_programs_end_with_2(
    program: str, arguments: Sequence[str], field: str, tmp_path: Path
) -> None:
    if program == "kvstore.node":
        spec = {"node_id": "a", "arena": str(tmp_path / "a"), "slot_bytes": 1, "num_slots": 1}
        spec |= {"host_address": "127.0.0.1:0", "kvstore": {"peer_transport": "nixl"}}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        arguments = ["--spec", str(tmp_path / "spec.json")]
    start = f"import runpy, sys; sys.modules['nixl'] = None; runpy.run_module({program!r}, run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=python_environment(),
        cwd=REPOSITORY,
    )
    assert result.returncode == 2, result.stderr
    assert f"{field}nixl needs the nixl package" in result.stderr


def no_bodies(table: Sequence[TableEntry]) -> Bodies:
    assert not any(entry.sealed_bytes for entry in table)
    yield from ()


def test_a_node_without_it_is_not_read_from(peer_node: KVNode) -> None:
    address = str(peer_node.ready["peer_address"])
    channel = PeerChannel(address, FragmentAuthenticator(SECRET))
    assert channel.describe() == b""
    deadline_s = time.monotonic() + 60
    assert list(channel.pull(PULL, [bytes(22)], deadline_s, no_bodies)) == []  # and the connection goes on
    with pytest.raises(OSError, match="gone"):
        list(channel.pull(READ, [bytes(22)], deadline_s, no_bodies))
    channel.close()


# ---------------------------------------------------------------------------------------------------- where it is there


@pytest.fixture(scope="module")
def nixl_node() -> Iterator[KVNode]:
    pytest.importorskip("nixl")
    options = {"peer_address": "127.0.0.1:0", "kvstore": {"peer_transport": "nixl"}}
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", SLOT_BYTES, 256, options=options, secret=SECRET)
    yield node
    node.close()


@pytest.fixture
def host(nixl_node: KVNode) -> Iterator[HostTier]:
    tier = HostTier(nixl_node.host_address)
    yield tier
    tier.close()


@pytest.fixture
def directory() -> MemoryDirectory:
    return MemoryDirectory(time.monotonic)


@pytest.fixture
def peer(directory: MemoryDirectory, host: HostTier) -> Iterator[PeerTier]:
    """Connected: the first time takes long on a machine that has other things to do."""
    pytest.importorskip("nixl")
    from kvstore.tiers.peers.nixl_transport import NixlReader, NixlTransport

    authenticator, reader = FragmentAuthenticator(SECRET), NixlReader()
    tier = PeerTier(directory, SECRET, lambda: "", lambda address: NixlTransport(address, authenticator, reader))
    fragments = make_fragments(1)
    host.store(fragments)
    publish(directory, fragments, host.peer_address)
    wait_until(lambda: tier.load(keys_of(fragments)) == payloads(fragments), "the peer is connected")
    yield tier
    tier.close()


def payloads(fragments: Sequence[Fragment]) -> list[memoryview]:
    return [fragment.payload for fragment in fragments]


@pytest.mark.parametrize("num_connections", [1, 3])
def test_many_groups_over_several_connections(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, num_connections: int
) -> None:
    peer._num_connections = num_connections  # else it depends on the machine
    fragments, unknown = make_fragments(200, SLOT_BYTES), make_fragments(2)
    assert host.store(fragments) == [True] * 200
    publish(directory, fragments + unknown, host.peer_address)
    for _ in range(3):
        assert peer.load(keys_of(unknown + fragments)) == [None] * 2 + payloads(fragments)


def test_the_tiers_of_a_worker_read_by_it(nixl_node: KVNode, host: HostTier) -> None:
    tier = open_tiers("", KVStoreConfig(peers=True, peer_transport="nixl"), SECRET, nixl_node.control_url)[0]
    fragments = make_fragments(3)
    host.store(fragments)
    tier._directory.publish([fragments[0].key[:16]], f"peer:{host.peer_address}")  # type: ignore[attr-defined]
    wait_until(lambda: tier.load(keys_of(fragments)) == payloads(fragments), "the peer is read from")
    tier.close()


def test_a_node_that_offers_nothing_is_left_alone(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, peer_node: KVNode
) -> None:
    fragments = make_fragments(3)
    host.store(fragments)
    publish(directory, fragments, str(peer_node.ready["peer_address"]))
    assert peer.load(keys_of(fragments)) == [None] * 3
    publish(directory, fragments, host.peer_address)
    assert peer.load(keys_of(fragments)) == payloads(fragments)


def test_bytes_that_the_peer_holds_damaged_are_refused_and_forgotten_there(
    peer: PeerTier, directory: MemoryDirectory, nixl_node: KVNode, host: HostTier
) -> None:
    good, bad = make_fragments(2)
    host.store([good, bad])
    publish(directory, [good, bad], host.peer_address)
    offset = nixl_node.arena.read_bytes().index(bad.payload)
    with open(nixl_node.arena, "r+b") as file:
        file.seek(offset)
        file.write(bytes([bad.payload[0] ^ 1]))
    assert peer.load([good.key, bad.key]) == [good.payload, Rejected("checksum")]
    assert peer.load([good.key, bad.key]) == [good.payload, None]
    assert stats_of(nixl_node).rejected["checksum"] == 1


@pytest.fixture
def proxy(host: HostTier) -> Iterator[Callable[..., str]]:
    """Starts a proxy before the node, for one answer of three fragments; its address."""
    processes: list[subprocess.Popen[str]] = []

    def start(**edit: object) -> str:
        turns = [ANSWER + description_bytes(host), trailers_at(host)]
        plan = json.dumps({"hold": turns[1] + 3 * TRAILER_BYTES, "turns": turns, "edits": [edit]})
        command = [sys.executable, "-m", "tests.kvstore.damaging_proxy", host.peer_address, plan]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=python_environment())
        processes.append(process)
        assert process.stdout is not None
        return f"127.0.0.1:{process.stdout.readline().strip()}"

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


ANSWER = HELLO_BYTES + HEAD_BYTES + DESCRIPTION_HEAD_BYTES


def description_bytes(host: HostTier) -> int:
    channel = PeerChannel(host.peer_address, FragmentAuthenticator(SECRET))
    length = len(channel.describe())
    channel.close()
    return length


def addresses_at(host: HostTier) -> int:
    """Where three addresses begin in what the peer sends."""
    return ANSWER + description_bytes(host) + HEAD_BYTES + table_bytes(3)


def trailers_at(host: HostTier) -> int:
    return addresses_at(host) + address_bytes(3)


@pytest.mark.parametrize(
    ("start", "offset", "reason"),
    [
        (lambda host: ANSWER, 100, None),  # the description
        (lambda host: ANSWER, -1, None),  # its tag
        (lambda host: HELLO_BYTES + HEAD_BYTES, 3, None),  # its length
        (addresses_at, 8 + 6, None),  # far outside of the memory
        (addresses_at, 8 + 1, "stale"),  # into another slot
        (trailers_at, TRAILER_BYTES, "stale"),
        (trailers_at, TRAILER_BYTES + 5, "forged"),
    ],
    ids=["description", "proof", "length", "outside", "inside", "current", "tag"],
)
def test_what_is_damaged_on_its_way_is_refused(
    host: HostTier,
    peer: PeerTier,
    directory: MemoryDirectory,
    proxy: Callable[..., str],
    start: Callable[[HostTier], int],
    offset: int,
    reason: RejectReason | None,
) -> None:
    fragments = make_fragments(3)
    host.store(fragments)
    publish(directory, fragments, proxy(at=start(host) + offset, xor=2))
    good = payloads(fragments)
    truncated: list[Rejected | None] = [Rejected("truncated")] * 3 if start is addresses_at else [None] * 3
    assert peer.load(keys_of(fragments)) == ([good[0], Rejected(reason), good[2]] if reason else truncated)
    publish(directory, fragments, host.peer_address)
    wait_until(lambda: peer.load(keys_of(fragments)) == good, "the peer itself is asked")  # its copies were good


def test_swapped_addresses_are_stale(
    host: HostTier, peer: PeerTier, directory: MemoryDirectory, proxy: Callable[..., str]
) -> None:
    fragments = make_fragments(3)
    host.store(fragments)
    first = addresses_at(host)
    publish(directory, fragments, proxy(at=first, swap=[first + 8, 8]))
    assert peer.load(keys_of(fragments)) == [Rejected("stale"), Rejected("stale"), fragments[2].payload]


def test_a_peer_that_was_killed_and_replaced(directory: MemoryDirectory, peer: PeerTier) -> None:
    address = f"127.0.0.1:{free_port()}"
    options = {"peer_address": address, "kvstore": {"peer_transport": "nixl"}}
    node = KVNode(f"test-{uuid.uuid4().hex[:12]}", options=options, secret=SECRET)
    host = HostTier(node.host_address)
    fragments = make_fragments(3)
    host.store(fragments)
    publish(directory, fragments, address)
    wait_until(lambda: peer.load(keys_of(fragments)) == payloads(fragments), "the peer is read from")
    node.kill()
    assert peer.load(keys_of(fragments)) == [None] * 3
    node.start()
    wait_until(lambda: host.store(fragments) == [True] * 3, "fragments are in the new arena")
    wait_until(lambda: peer.load(keys_of(fragments)) == payloads(fragments), "the peer is asked again")
    host.close()
    node.close()


def test_slots_that_are_given_away_while_they_are_read_are_stale(directory: MemoryDirectory, tmp_path: Path) -> None:
    """The first group is taken, and the rest after all slots have other fragments. Each lies alone in its group."""
    pytest.importorskip("nixl")
    from kvstore.tiers.peers.nixl_transport import NixlMemory, NixlReader, NixlTransport

    payload_bytes, num_slots = GROUP_BYTES + 1000, 6
    owned = create_arena(tmp_path / "test.arena", "test", payload_bytes, num_slots)
    slots = NodeSlots(owned.arena, SlotTable(num_slots, time.monotonic))
    old, new = make_fragments(num_slots, payload_bytes), make_fragments(num_slots, payload_bytes)

    def fill(fragments: Sequence[Fragment]) -> None:
        refs = slots.reserve(keys_of(fragments))
        for fragment, ref in zip(fragments, refs, strict=True):
            owned.arena.write([ref.slot], [fragment], [ref.generation])
        assert slots.seal(keys_of(fragments), refs) == num_slots

    fill(old)
    memory = NixlMemory(owned.arena)
    server = PeerServer("127.0.0.1:0", slots, SECRET, memory)
    transport = NixlTransport(server.address, FragmentAuthenticator(SECRET), NixlReader())
    tier = PeerTier(directory, SECRET, lambda: "")
    pulling = transport.pull(keys_of(old), time.monotonic() + 60)
    results = [tier._verified(next(pulling)[1], old[0].key)]
    fill(new)
    results += [tier._verified(pulled, old[i].key) for i, pulled in pulling]
    assert results[0] == old[0].payload
    assert results[1:] == [Rejected("stale")] * (num_slots - 1)
    assert [
        tier._verified(pulled, new[i].key) for i, pulled in transport.pull(keys_of(new), time.monotonic() + 60)
    ] == [fragment.payload for fragment in new]
    transport.close()
    tier.close()
    server.close()
    memory.close()
    slots.close()
    owned.remove()
