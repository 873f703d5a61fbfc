"""Fragments with random keys and contents, and what is done to them behind a tier's back."""

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstore.format.authenticity import TAG_BYTES, FragmentAuthenticator
from kvstore.format.fragment import Fragment
from kvstore.format.sealing import HEADER_BYTES, seal
from kvstore.names import fragment_key
from kvstore.tiers.redis.redis_tier import KEY_PREFIX

SECRET = "of the tests"
REDIS_PREFIX = KEY_PREFIX + FragmentAuthenticator(SECRET).key_id.encode() + b":"


def make_fragments(count: int, payload_bytes: int = 1000) -> list[Fragment]:
    """Fragments whose payloads are slices of one buffer, as a rank packs them. No two calls share a key."""
    buffer = memoryview(random.randbytes(count * payload_bytes))
    name = random.randbytes(16)
    return [
        Fragment(fragment_key(name, 0, 2, i), buffer[i * payload_bytes : (i + 1) * payload_bytes]) for i in range(count)
    ]


def make_compressible(count: int, payload_bytes: int = 1000) -> list[Fragment]:
    """As make_fragments, of numbers of nearly one size: every fourth byte has four values, and two of four are zero."""
    fragments = []
    for fragment in make_fragments(count, payload_bytes):
        payload = bytearray(payload_bytes)
        payload[::4] = fragment.payload[::4]
        payload[3::4] = bytes(0x3C + value % 4 for value in fragment.payload[3::4])
        fragments.append(Fragment(fragment.key, memoryview(payload)))
    return fragments


def keys_of(fragments: Sequence[Fragment]) -> list[bytes]:
    """Their keys."""
    return [fragment.key for fragment in fragments]


def sealed_copy(fragment: Fragment, generation: int = 0) -> memoryview:
    """Header and payload, as a tier keeps them."""
    payload = fragment.payload.tobytes()
    return memoryview(bytearray(seal(fragment.key, memoryview(payload), generation) + payload))


_OVERWRITE = """
import sys
with open(sys.argv[1], "r+b") as file:
    file.seek(int(sys.argv[2]))
    file.write(sys.stdin.buffer.read())
"""


def find_stored(folder: Path, fragment: Fragment) -> tuple[Path, int]:
    """The segment file that has the fragment, and where its header begins."""
    for path in folder.glob("*.segment"):
        offset = path.read_bytes().find(fragment.payload.tobytes())
        if offset >= 0:
            return path, offset - HEADER_BYTES
    raise AssertionError("no segment has the fragment")


def damage_segments(folder: Path, fragment: Fragment, damage: Callable[[bytes], bytes]) -> None:
    """Another process writes damage(header, payload and tag) over a fragment on disk."""
    path, offset = find_stored(folder, fragment)
    stored = path.read_bytes()[offset : offset + HEADER_BYTES + fragment.payload.nbytes + TAG_BYTES]
    command = [sys.executable, "-c", _OVERWRITE, str(path), str(offset)]
    subprocess.run(command, input=damage(stored), check=True)
