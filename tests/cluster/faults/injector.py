"""Damages stored KV fragments behind the cluster's back, in a process of its own.

    python -m tests.cluster.faults.injector

Knows how fragments are stored and travel, and nothing else: it maps the arena's file, writes into the disk tier's
segments, talks to the Redis, or sits on the wire between two hosts, as a bad memory cell, a torn write or a meddler
would. Reads one JSON object a line, {"keys": [HEX, ...]}, damages these fragments, the kinds of faults in turn, and
answers with {"damaged": {KIND: NUMBER}}; a swap damages two. On the wire, keys are damaged from then on, and the answer
says what was done since the last one, and how many readers went away meanwhile: {..., "num_gone": NUMBER}. Every fault
makes a fragment that must not be used.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import select
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvstore.format.authenticity import TAG_BYTES
from kvstore.format.compression import COMPRESSED, is_compressed
from kvstore.format.sealing import GENERATION_OFFSET, HEADER_BYTES, RESERVED, SEALED, seal
from kvstore.tiers.peers.peer_wire import HEAD_BYTES, HELLO_BYTES, TRAILER_BYTES, groups, table_bytes, unpack_table
from tests.cluster.faults.storages import (
    CHECKSUM_OFFSET,
    KEY_OFFSET,
    PAYLOAD_BYTES_OFFSET,
    ZEROS_OFFSET,
    ArenaStorage,
    DiskStorage,
    RedisStorage,
    Storage,
    WireStorage,
)


class Injector:
    """Faults of all kinds in equal shares, each in several forms; the same ones for the same seed."""

    def __init__(self, storage: Storage, seed: int, num_tag_bytes: int) -> None:
        """num_tag_bytes: what the storage keeps behind the payload, made with a secret."""
        self._storage = storage
        self._random = random.Random(seed)
        self._num_tag_bytes = num_tag_bytes
        self._older: bytes | None = None  # a whole fragment of earlier, with its generation
        self._forms = itertools.count()
        self._kinds: dict[str, Callable[[bytearray], bytes]] = {
            "flip": self._flip,
            "swap": self._flip,  # of one that has no partner
            "stale": self._stale,
            "truncation": self._truncate,
            "layout": self._change_layout,
        }
        if num_tag_bytes:
            self._kinds["forgery"] = self._forge

    def damage(self, keys: Sequence[bytes]) -> Counter[str]:
        """How many fragments have which kind of fault now; those that are not there have none."""
        made: Counter[str] = Counter()
        found = [(key, stored) for key in keys if (stored := self._storage.read(key)) is not None]
        pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
        for kind, pair in zip(itertools.cycle(self._kinds), pairs, strict=False):
            if kind == "swap" and len(pair) == 2:
                changed = self._swap(bytearray(pair[0][1]), bytearray(pair[1][1]))
            else:
                changed = [self._kinds[kind](bytearray(stored)) for _, stored in pair]
            for (key, stored), other in zip(pair, changed, strict=True):
                self._storage.write(key, other)
                if self._storage.read(key) == stored:  # what was cut off was a zero, for example
                    self._storage.write(key, self._flip(bytearray(stored)))
                made[kind] += 1
                self._older = bytes(stored)
        return made

    def _flip(self, stored: bytearray) -> bytes:
        stored[self._random.randrange(len(stored))] ^= 1 << self._random.randrange(8)
        return bytes(stored)

    def _swap(self, first: bytearray, second: bytearray) -> list[bytes]:
        # Everything, or the payload, or the payload with its checksum: the key does not come along.
        begin = (0, HEADER_BYTES, CHECKSUM_OFFSET)[next(self._forms) % 3]
        one = bytes(first[:begin] + second[begin:])
        other = bytes(second[:begin] + first[begin:])
        if begin != CHECKSUM_OFFSET:
            return [one, other]
        return [_with_key(one, first), _with_key(other, second)]

    def _stale(self, stored: bytearray) -> bytes:
        form = next(self._forms) % 3
        if form == 0 and self._older is not None:
            return self._older  # the last write got lost: what was there before is there again
        generation = int.from_bytes(stored[GENERATION_OFFSET:PAYLOAD_BYTES_OFFSET], "little")
        changed = generation + 1 if form == 1 or generation == 0 else self._random.randrange(generation)
        stored[GENERATION_OFFSET:PAYLOAD_BYTES_OFFSET] = changed.to_bytes(8, "little")
        return bytes(stored)

    def _truncate(self, stored: bytearray) -> bytes:
        form = next(self._forms) % 2
        payload_bytes = len(stored) - HEADER_BYTES - self._num_tag_bytes
        kept = self._random.randrange(payload_bytes)
        if form == 0:  # the header knows, and the checksum is that of the whole
            stored[PAYLOAD_BYTES_OFFSET:CHECKSUM_OFFSET] = kept.to_bytes(8, "little")
            return bytes(stored)
        return bytes(stored[: HEADER_BYTES + kept])

    def _change_layout(self, stored: bytearray) -> bytes:
        form = next(self._forms) % 5
        if form == 0:
            stored[:8] = b"SYfrag9\0"
        elif form == 4:  # one form of a fragment under the other's name
            stored[:8] = SEALED if is_compressed(memoryview(stored)) else COMPRESSED
        elif form == 1:
            stored[:8] = RESERVED
        elif form == 2:
            stored[ZEROS_OFFSET + self._random.randrange(KEY_OFFSET - ZEROS_OFFSET)] = self._random.randrange(1, 256)
        else:  # longer than any fragment
            stored[PAYLOAD_BYTES_OFFSET:CHECKSUM_OFFSET] = (1 << 40).to_bytes(8, "little")
        return bytes(stored)

    def _forge(self, stored: bytearray) -> bytes:
        """Other bytes with the right checksum, and a tag that its maker could not know."""
        end = len(stored) - self._num_tag_bytes
        payload = stored[HEADER_BYTES:end]
        payload[self._random.randrange(len(payload))] ^= 1
        generation = int.from_bytes(stored[GENERATION_OFFSET:PAYLOAD_BYTES_OFFSET], "little")
        header = seal(bytes(stored[KEY_OFFSET:HEADER_BYTES]), memoryview(payload), generation)
        return bytes(stored[:8]) + header[8:] + bytes(payload + stored[end:])


def _with_key(stored: bytes, keyed: bytearray) -> bytes:
    return stored[:KEY_OFFSET] + bytes(keyed[KEY_OFFSET:HEADER_BYTES]) + stored[HEADER_BYTES:]


class Wire:
    """A proxy between a host and its peer's node process. It damages the chosen fragment whenever that passes."""

    def __init__(self, upstream: str, seed: int) -> None:
        self._upstream = upstream.rpartition(":")
        self._seed = seed
        self._lock = threading.Lock()
        self._wanted: frozenset[bytes] = frozenset()
        self._damaged: Counter[str] = Counter()
        self._clients: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def want(self, keys: Sequence[bytes]) -> tuple[Counter[str], int]:
        """Damage these from now on; what was done until now, and how many clients went away."""
        with self._lock:
            self._wanted = frozenset(keys)
            damaged, self._damaged = self._damaged, Counter()
            gone = [client for client in self._clients if _is_gone(client)]
            self._clients = [client for client in self._clients if client not in gone]
            return damaged, len(gone)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with self._lock:
                self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        host, _, port = self._upstream
        with client, socket.create_connection((host, int(port))) as server:
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            storage = WireStorage()
            injector = Injector(storage, self._seed, 0)
            with contextlib.suppress(OSError):
                client.sendall(_exactly(server, HELLO_BYTES))
                while True:
                    self._answer(server, client, storage, injector)

    def _answer(self, server: socket.socket, client: socket.socket, storage: WireStorage, injector: Injector) -> None:
        head = _exactly(server, HEAD_BYTES)
        num_keys = int.from_bytes(head[-4:], "little")
        raw = _exactly(server, table_bytes(num_keys))
        client.sendall(head + raw)
        for group in groups(table := unpack_table(raw, num_keys)):
            sealed = [_exactly(server, table[i].sealed_bytes) for i in group]
            trailers = _exactly(server, TRAILER_BYTES * len(group))
            keys = [fragment[KEY_OFFSET:HEADER_BYTES] for fragment in sealed]
            storage.fragments = dict(zip(keys, sealed, strict=True))
            with self._lock:
                self._damaged += injector.damage([key for key in keys if key in self._wanted])
            client.sendall(b"".join(storage.fragments[key] for key in keys) + trailers)


def _is_gone(client: socket.socket) -> bool:
    """Asked of the kernel: a thread that waits for it may be late, and a request of the client's not be read yet."""
    if client.fileno() < 0:  # closed here
        return True
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        chunk = connection.recv(num_bytes - len(received))
        if not chunk:
            raise ConnectionResetError("the peer is gone")
        received += chunk
    return received


def _orders() -> Iterator[list[bytes]]:
    for line in sys.stdin:
        yield [bytes.fromhex(key) for key in json.loads(line)["keys"]]


def _storage_of(options: argparse.Namespace) -> tuple[Storage, Callable[[list[bytes]], object], Callable[[], None]]:
    """The storage, and what to do before and after each order."""
    if options.arena:
        arena = ArenaStorage(options.arena, options.slot_bytes, options.num_slots)
        return arena, lambda _: arena.find(), lambda: None
    if options.disk:
        disk = DiskStorage(options.disk)
        return disk, disk.find, lambda: None
    remote = RedisStorage(options.redis, bytes.fromhex(options.key_prefix))
    return remote, remote.fetch, remote.store


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arena", type=Path)
    parser.add_argument("--slot-bytes", type=int, default=0)
    parser.add_argument("--num-slots", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="folder of the segments")
    parser.add_argument("--redis", default="")
    parser.add_argument("--key-prefix", default="", help="as hex")
    parser.add_argument("--wire", default="", help="HOST:PORT of a peer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.wire:
        wire = Wire(options.wire, options.seed)
        print(json.dumps({"pid": os.getpid(), "port": wire.port}), flush=True)
        for keys in _orders():
            damaged, num_gone = wire.want(keys)
            print(json.dumps({"damaged": damaged, "num_gone": num_gone}), flush=True)
        return
    storage, before, after = _storage_of(options)
    injector = Injector(storage, options.seed, 0 if options.arena else TAG_BYTES)
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for keys in _orders():
        before(keys)
        damaged = injector.damage(keys)
        after()
        print(json.dumps({"damaged": damaged}), flush=True)


if __name__ == "__main__":
    main()
