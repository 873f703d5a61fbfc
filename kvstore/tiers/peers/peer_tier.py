"""The tier that other hosts are: fragments pulled from the arenas of their node processes.

The directory says which peer has a block (location `peer:HOST:PORT`). Nothing is stored here: the others can load what
a host has once it is in its own arena and announced. A peer that is away or hangs is left alone for a while; the others
go on. Knows nothing of what carries the bytes, nor of slots.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from kvstore.control.directory import Directory, DirectoryUnavailable
from kvstore.format.authenticity import FragmentAuthenticator
from kvstore.format.buffers import CopyBuffers
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import unseal
from kvstore.names import NAME_BYTES
from kvstore.network.availability import Availability, one_line
from kvstore.tiers.peers.peer_wire import GROUP_BYTES
from kvstore.tiers.peers.tcp_transport import TcpTransport
from kvstore.tiers.peers.transport import Pulled, Transport

log = logging.getLogger(__name__)

PEER_LOCATION = "peer:"
"""Before the HOST:PORT of a node process: a location, as the directory names them."""

_MAX_CONNECTIONS = 4  # to each peer, used at once; one fills a slow network, and two share one core's time
_CORES_PER_CONNECTION = 4
_MIN_KEYS = 16  # for each of them
_PULL_S = 5.0  # for all that one load asks of the peers
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
_NUM_PEERS_ASKED = 2  # for one fragment, one after the other


@dataclass(slots=True)
class _Peer:
    idle: list[Transport] = field(default_factory=list)
    pause_s: float = _FIRST_PAUSE_S
    resumes_at_s: float = 0.0


class PeerTier:
    """A client of all peers that `directory` names, this host's own address apart."""

    name = "peer"

    def __init__(
        self,
        directory: Directory,
        secret: str,
        own_address: Callable[[], str],
        connect: Callable[[str], Transport] | None = None,
    ) -> None:
        """connect: makes a Transport to an address, by TCP unless it says otherwise; raises OSError."""
        self._directory = directory
        self._authenticator = FragmentAuthenticator(secret)
        self._own_address = own_address
        self._num_connections = min(_MAX_CONNECTIONS, max(1, (os.cpu_count() or 1) // _CORES_PER_CONNECTION))
        self._buffers = CopyBuffers(GROUP_BYTES)
        self._connect = connect if connect is not None else self._connect_tcp
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._is_closed = False
        self._threads = ThreadPoolExecutor(8, "kv-pull")
        self._availability = Availability("peer tier", self._probe, self._probe, (DirectoryUnavailable,))

    @property
    def is_up(self) -> bool:
        """As in Tier: whether the directory answers. Which peers do shows when they are asked."""
        return self._availability.is_up

    @property
    def problem(self) -> str:
        """As in Tier."""
        return self._availability.problem

    def store(self, fragments: Sequence[Fragment]) -> list[bool]:
        """As in Tier; nothing is kept."""
        return [False] * len(fragments)

    def load(self, keys: Sequence[bytes]) -> list[memoryview | Rejected | None]:
        """As in Tier."""
        payloads: list[memoryview | Rejected | None] = [None] * len(keys)
        if not self.is_up or not keys:
            return payloads
        try:
            locations = self._locate([key[:NAME_BYTES] for key in keys])
        except DirectoryUnavailable as error:
            self._availability.lost(error)
            return payloads
        deadline_s = time.monotonic() + _PULL_S
        asked: list[set[str]] = [set() for _ in keys]
        for _ in range(_NUM_PEERS_ASKED):
            wanted: dict[str, list[int]] = {}
            for i in (i for i in range(len(keys)) if payloads[i] is None):
                peer = self._choose(locations[i] - asked[i], keys[i])
                if peer is not None:
                    asked[i].add(peer)
                    wanted.setdefault(peer, []).append(i)
            if not wanted:
                break
            self._load_from(wanted, keys, payloads, deadline_s)
        return payloads

    def close(self) -> None:
        """As in Tier."""
        self._availability.close()
        with self._lock:
            self._is_closed = True
            idle = [transport for peer in self._peers.values() for transport in peer.idle]
            self._peers.clear()
        for transport in idle:
            transport.close()
        self._threads.shutdown(wait=True)
        self._directory.close()

    # -- whom to ask

    def _probe(self) -> None:
        self._locate([])

    def _locate(self, names: Sequence[bytes]) -> list[set[str]]:
        """For each name the addresses of the peers that have the block."""
        own = self._own_address()
        distinct = list(dict.fromkeys(names))
        found = dict(zip(distinct, self._directory.locate(distinct), strict=True))
        addresses = {
            name: {location.removeprefix(PEER_LOCATION) for location in locations if location.startswith(PEER_LOCATION)}
            - {own}
            for name, locations in found.items()
        }
        return [addresses[name] for name in names]

    def _choose(self, addresses: set[str], key: bytes) -> str | None:
        """One of those that are not left alone now, not the same for all blocks."""
        now_s = time.monotonic()
        with self._lock:
            usable = [a for a in sorted(addresses) if a not in self._peers or self._peers[a].resumes_at_s <= now_s]
        return usable[key[0] % len(usable)] if usable else None

    # -- pulling

    def _load_from(
        self,
        wanted: dict[str, list[int]],
        keys: Sequence[bytes],
        payloads: list[memoryview | Rejected | None],
        deadline_s: float,
    ) -> None:
        pulls: list[Future[None]] = []
        for address, indices in wanted.items():
            size = max(_MIN_KEYS, -(-len(indices) // self._num_connections))
            for first in range(0, len(indices), size):
                part = indices[first : first + size]
                pulls.append(self._threads.submit(self._pull, address, part, keys, payloads, deadline_s))
        for pull in pulls:
            pull.result()  # raises what must not happen

    def _pull(
        self,
        address: str,
        indices: Sequence[int],
        keys: Sequence[bytes],
        payloads: list[memoryview | Rejected | None],
        deadline_s: float,
    ) -> None:
        """Fills in what came, verified."""
        try:
            for is_used in (True, False):
                transport = self._take(address, is_used)
                num_pulled = 0
                try:
                    for index, pulled in transport.pull([keys[i] for i in indices], deadline_s):
                        payloads[indices[index]] = self._verified(pulled, keys[indices[index]])
                        num_pulled += 1
                    self._report_bad(transport, indices, keys, payloads, deadline_s)
                    break
                except OSError:
                    transport.close()
                    if num_pulled or not is_used:
                        raise
                    # The peer may have been replaced since the connection was last used: once more, with a new one.
        except OSError as error:
            self._lost(address, error)
            return
        self._give_back(address, transport)

    def _report_bad(
        self,
        transport: Transport,
        indices: Sequence[int],
        keys: Sequence[bytes],
        payloads: Sequence[memoryview | Rejected | None],
        deadline_s: float,
    ) -> None:
        """So that they are not pulled and refused again and again. The peer sees for itself."""
        bad = [keys[i] for i in indices if isinstance(payloads[i], Rejected)]
        if bad:
            transport.check(bad, deadline_s)

    def _verified(self, pulled: Pulled | Rejected, key: bytes) -> memoryview | Rejected:
        if isinstance(pulled, Rejected):
            return pulled
        if not pulled.sealed:
            return Rejected("truncated")
        if not pulled.is_current:
            return Rejected("stale")
        payload = unseal(pulled.sealed, key, pulled.generation)  # first: it tells one fault from another
        if not isinstance(payload, Rejected) and not self._authenticator.is_genuine(pulled.sealed, pulled.tag):
            return Rejected("forged")
        return payload

    # -- connections

    def _connect_tcp(self, address: str) -> Transport:
        return TcpTransport(address, self._authenticator, self._buffers)

    def _take(self, address: str, is_used: bool) -> Transport:
        """is_used: one that was used before will do."""
        if is_used:
            with self._lock:
                peer = self._peers.setdefault(address, _Peer())
                if peer.idle:
                    return peer.idle.pop()
        return self._connect(address)

    def _give_back(self, address: str, transport: Transport) -> None:
        with self._lock:
            if not self._is_closed:
                peer = self._peers.setdefault(address, _Peer())
                peer.pause_s = _FIRST_PAUSE_S
                if len(peer.idle) < self._num_connections:
                    peer.idle.append(transport)
                    return
        transport.close()

    def _lost(self, address: str, error: OSError) -> None:
        log.warning("peer at %s is left alone for a while: %s", address, one_line(error))
        with self._lock:
            peer = self._peers.setdefault(address, _Peer())
            idle, peer.idle = peer.idle, []
            peer.resumes_at_s = time.monotonic() + peer.pause_s
            peer.pause_s = min(2 * peer.pause_s, _LONGEST_PAUSE_S)
        for transport in idle:
            transport.close()
