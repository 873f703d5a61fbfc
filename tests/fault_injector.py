"""Damages stored KV fragments behind the cluster's back, in a process of its own: `python -m tests.fault_injector`.

Knows how fragments are stored and nothing else: it maps the arena's file, or talks to the Redis, as a bad memory cell,
a torn write or a meddler would. Reads one JSON object a line, {"keys": [HEX, ...]}, damages these fragments, the kinds
of faults in turn, and answers with {"damaged": {KIND: NUMBER}}; a swap damages two. Every fault makes a fragment that
must not be used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import redis

from kvstore.arena import arena_bytes
from kvstore.authenticity import TAG_BYTES
from kvstore.names import FRAGMENT_KEY_BYTES
from kvstore.sealing import GENERATION_OFFSET, HEADER_BYTES, RESERVED, SEALED, seal

PAYLOAD_BYTES_OFFSET, CHECKSUM_OFFSET, ZEROS_OFFSET = 16, 24, 32
KEY_OFFSET = HEADER_BYTES - FRAGMENT_KEY_BYTES


class Place(Protocol):
    """Where sealed fragments lie: a header and a payload each."""

    def read(self, key: bytes) -> bytes | None:
        """Header and payload, and what the place keeps behind them."""

    def write(self, key: bytes, stored: bytes) -> None:
        """Instead of what is there; may be shorter."""


class ArenaPlace:
    """The file of a host's arena, mapped as the workers map it."""

    def __init__(self, path: Path, slot_bytes: int, num_slots: int) -> None:
        descriptor = os.open(path, os.O_RDWR)
        self._map = mmap.mmap(descriptor, arena_bytes(slot_bytes, num_slots))
        os.close(descriptor)
        self._first = arena_bytes(slot_bytes, 0)
        self._stride = arena_bytes(slot_bytes, 1) - self._first
        self._num_slots = num_slots
        self._places: dict[bytes, tuple[int, int]] = {}

    def find(self) -> None:
        """Look where which fragment is now, and how long it is."""
        self._places = {}
        for slot in range(self._num_slots):
            at = self._first + slot * self._stride
            header = self._map[at : at + HEADER_BYTES]
            payload_bytes = int.from_bytes(header[PAYLOAD_BYTES_OFFSET:CHECKSUM_OFFSET], "little")
            if header.startswith(SEALED) and 0 < payload_bytes <= self._stride - HEADER_BYTES:
                self._places[header[KEY_OFFSET:]] = at, HEADER_BYTES + payload_bytes

    def read(self, key: bytes) -> bytes | None:
        """As in Place."""
        at, size = self._places.get(key, (0, 0))
        return self._map[at : at + size] if size else None

    def write(self, key: bytes, stored: bytes) -> None:
        """As in Place. What is cut off is nothing: a file that was not written to its end reads as zeros."""
        at, size = self._places[key]
        self._map[at : at + size] = stored[:size].ljust(size, b"\0")


class RedisPlace:
    """The values of a Redis."""

    def __init__(self, url: str, key_prefix: bytes) -> None:
        self._client = redis.Redis.from_url(url)
        self._prefix = key_prefix
        self._values: dict[bytes, bytes] = {}
        self._changed: dict[bytes, bytes] = {}

    def fetch(self, keys: Sequence[bytes]) -> None:
        """Read what is there."""
        values = self._client.mget([self._prefix + key for key in keys])
        self._values = {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    def store(self) -> None:
        """Write what was changed, as it is: whatever time to live a value had, it keeps."""
        pipeline = self._client.pipeline(transaction=False)
        for key, value in self._changed.items():
            pipeline.set(self._prefix + key, value, keepttl=True)
        pipeline.execute()
        self._changed = {}

    def read(self, key: bytes) -> bytes | None:
        """As in Place."""
        return self._changed.get(key, self._values.get(key))

    def write(self, key: bytes, stored: bytes) -> None:
        """As in Place."""
        self._changed[key] = stored


class Injector:
    """Faults of all kinds in equal shares, each in several forms; the same ones for the same seed."""

    def __init__(self, place: Place, seed: int, num_tag_bytes: int) -> None:
        """num_tag_bytes: what the place keeps behind the payload, made with a secret."""
        self._place = place
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
        found = [(key, stored) for key in keys if (stored := self._place.read(key)) is not None]
        pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
        for kind, pair in zip(itertools.cycle(self._kinds), pairs, strict=False):
            if kind == "swap" and len(pair) == 2:
                changed = self._swap(bytearray(pair[0][1]), bytearray(pair[1][1]))
            else:
                changed = [self._kinds[kind](bytearray(stored)) for _, stored in pair]
            for (key, stored), other in zip(pair, changed, strict=True):
                self._place.write(key, other)
                if self._place.read(key) == stored:  # what was cut off was a zero, for example
                    self._place.write(key, self._flip(bytearray(stored)))
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
        form = next(self._forms) % 4
        if form == 0:
            stored[:8] = b"SYfrag2\0"
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
        return seal(bytes(stored[KEY_OFFSET:HEADER_BYTES]), memoryview(payload), 0) + bytes(payload + stored[end:])


def _with_key(stored: bytes, keyed: bytearray) -> bytes:
    return stored[:KEY_OFFSET] + bytes(keyed[KEY_OFFSET:HEADER_BYTES]) + stored[HEADER_BYTES:]


def _orders() -> Iterator[list[bytes]]:
    for line in sys.stdin:
        yield [bytes.fromhex(key) for key in json.loads(line)["keys"]]


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arena", type=Path)
    parser.add_argument("--slot-bytes", type=int, default=0)
    parser.add_argument("--num-slots", type=int, default=0)
    parser.add_argument("--redis", default="")
    parser.add_argument("--key-prefix", default="", help="as hex")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps({"pid": os.getpid()}), flush=True)
    arena = ArenaPlace(options.arena, options.slot_bytes, options.num_slots) if options.arena else None
    remote = RedisPlace(options.redis, bytes.fromhex(options.key_prefix)) if options.redis else None
    place = arena or remote
    assert place is not None, "--arena or --redis"
    injector = Injector(place, options.seed, TAG_BYTES if remote else 0)
    for keys in _orders():
        if arena is not None:
            arena.find()
        if remote is not None:
            remote.fetch(keys)
        damaged = injector.damage(keys)
        if remote is not None:
            remote.store()
        print(json.dumps({"damaged": damaged}), flush=True)


if __name__ == "__main__":
    main()
