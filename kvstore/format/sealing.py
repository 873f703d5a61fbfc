"""How a fragment is stored: a 64-byte header, then the payload, with one checksum over payload and key.

    offset  0  magic, 8 bytes          which format, and whether the payload is complete
            8  generation, uint64      of an arena's slot: grows with each reuse; on disk: the segment's number; else 0
           16  payload bytes, uint64
           24  xxh3-64 over payload + key, uint64
           32  zeros, 10 bytes
           42  key, 22 bytes
           64  payload

The key comes last in the checksum: so its stripes are the payload's lines in the processor's caches, which a copy can
then write past them. Integers are little-endian. Knows nothing of where the bytes are kept.
"""

import struct
from collections.abc import Sequence

import xxhash

from kvstore.format.copying import Bytes, copy_digests
from kvstore.format.fragment import Rejected
from kvstore.names import FRAGMENT_KEY_BYTES

HEADER_BYTES = 64
GENERATION_OFFSET = 8
SEALED = b"SYfrag2\0"
RESERVED = b"SYopen1\0"

_HEADER = struct.Struct("<8sQQQ10s22s")
_RESERVED_HEADER = struct.Struct("<8sQ48x")
_GENERATION = struct.Struct("<Q")
_KEY_OFFSET = HEADER_BYTES - FRAGMENT_KEY_BYTES
_ZEROS = bytes(10)
assert _HEADER.size == HEADER_BYTES


def seal(key: bytes, payload: memoryview, generation: int) -> bytes:
    """The header of a complete fragment that lies elsewhere, in one piece."""
    return _HEADER.pack(SEALED, generation, payload.nbytes, _checksum(payload, key), _ZEROS, key)


def seal_into(target: memoryview, payload: Bytes, key: bytes, generation: int) -> None:
    """Writes header and payload for use by this process, right away."""
    (digest,) = copy_digests([target[HEADER_BYTES:]], [payload], [key])
    _write_header(target, key, generation, digest)


def seal_all_into(
    targets: Sequence[memoryview], payloads: list[Bytes], keys: list[bytes], generations: Sequence[int]
) -> None:
    """Writes headers and payloads for other processes. The headers go last: until then they see what was there."""
    digests = copy_digests([target[HEADER_BYTES:] for target in targets], payloads, keys, past_caches=True)
    for target, key, generation, digest in zip(targets, keys, generations, digests, strict=True):
        _write_header(target, key, generation, digest)


def reseal(sealed: memoryview, generation: int) -> None:
    """Makes a verified copy of one tier's fragment one for another tier. The checksum stays what its writer made."""
    _GENERATION.pack_into(sealed, GENERATION_OFFSET, generation)


def key_of(sealed: memoryview) -> bytes:
    """The key in a fragment's header."""
    return bytes(sealed[_KEY_OFFSET:HEADER_BYTES])


def reserve_at(buffer: memoryview, offset: int, generation: int) -> None:
    """Writes the header of a slot that is being filled: it holds nothing."""
    _RESERVED_HEADER.pack_into(buffer, offset, RESERVED, generation)


def generation_at(buffer: memoryview, offset: int) -> int:
    """Generation in the header that starts at `offset`."""
    generation: int = _GENERATION.unpack_from(buffer, offset + GENERATION_OFFSET)[0]
    return generation


def payload_bytes_at(buffer: memoryview, offset: int, key: bytes, generation: int) -> int | Rejected:
    """Size of the payload after the header at `offset`, if that is the header of a complete fragment of this key."""
    header = _header_at(buffer, offset, key, generation)
    return header if isinstance(header, Rejected) else header[0]


def sealed_bytes_at(buffer: memoryview, offset: int) -> int:
    """Size of header and payload of whatever complete fragment begins at `offset`; 0 when none does."""
    magic, _, payload_bytes, _, zeros, _ = _HEADER.unpack_from(buffer, offset)
    return HEADER_BYTES + int(payload_bytes) if magic == SEALED and zeros == _ZEROS else 0


def unseal(copy: memoryview, key: bytes, generation: int) -> memoryview | Rejected:
    """The payload within a private copy of a stored fragment, if header, size and checksum are right."""
    if len(copy) < HEADER_BYTES:
        return Rejected("truncated")
    header = _header_at(copy, 0, key, generation)
    if isinstance(header, Rejected):
        return header
    payload_bytes, checksum = header
    if payload_bytes != len(copy) - HEADER_BYTES:
        return Rejected("truncated")
    payload = copy[HEADER_BYTES:]
    return payload if _checksum(payload, key) == checksum else Rejected("checksum")


def unseal_into(
    buffers: Sequence[Bytes], sources: Sequence[memoryview], keys: Sequence[bytes], generations: Sequence[int]
) -> list[Rejected | None]:
    """Copies payloads of their buffers' sizes from behind headers, where others may write meanwhile; None for each copy
    that is right. "layout" when a header has another size: under this name the reader has something else.
    """
    results: list[Rejected | None] = [None] * len(sources)
    checksums: dict[int, int] = {}
    for i, (source, key, generation) in enumerate(zip(sources, keys, generations, strict=True)):
        header = _header_at(source, 0, key, generation)
        if isinstance(header, Rejected):
            results[i] = header
        elif header[0] != len(source) - HEADER_BYTES:
            results[i] = Rejected("layout")
        else:
            checksums[i] = header[1]
    digests = copy_digests(
        [buffers[i] for i in checksums],
        [sources[i][HEADER_BYTES:] for i in checksums],
        [keys[i] for i in checksums],
        past_caches=True,
    )
    for (i, checksum), digest in zip(checksums.items(), digests, strict=True):
        if generation_at(sources[i], 0) != generations[i]:  # the slot was given away while it was copied
            results[i] = Rejected("stale")
        elif digest != checksum:
            results[i] = Rejected("checksum")
    return results


def _checksum(payload: memoryview, key: bytes) -> int:
    digest = xxhash.xxh3_64(payload)
    digest.update(key)
    return int(digest.intdigest())


def _write_header(target: memoryview, key: bytes, generation: int, digest: int) -> None:
    target[:HEADER_BYTES] = _HEADER.pack(SEALED, generation, len(target) - HEADER_BYTES, digest, _ZEROS, key)


def _header_at(buffer: memoryview, offset: int, key: bytes, generation: int) -> tuple[int, int] | Rejected:
    """(payload bytes, checksum) of the header at `offset`, if it is that of a complete fragment of this key."""
    magic, held_generation, payload_bytes, checksum, zeros, held_key = _HEADER.unpack_from(buffer, offset)
    if held_generation != generation or held_key != key:
        return Rejected("stale")
    if magic != SEALED or zeros != _ZEROS:
        return Rejected("layout")
    return payload_bytes, checksum
