"""Lossless compression of sealed fragments for tiers that are slower than the processor: byte planes, then zstd.

    offset  0  a header as in format.sealing, with another magic: size and checksum are those of what follows here
           64  the fragment's own header, as its writer sealed it
          128  one zstd frame: the payload, its bytes sorted by their position within 4-byte words

Bytes of equal significance lie together, since exponents repeat and mantissas do not. What is stored is verified before
anything is decompressed, the payload by its writer's checksum after that; a frame gives the number of bytes that the
fragment's header says, within a bound, or nothing. A fragment of which little would be saved stays as it is, so a tier
holds both forms, and readers distinguish them. Knows nothing of files and servers.
"""

import numpy as np
import zstandard

from kvstore.config import COMPRESSIONS
from kvstore.format.buffers import CopyBuffers
from kvstore.format.fragment import Rejected
from kvstore.format.sealing import (
    HEADER_BYTES,
    SEALED,
    generation_at,
    key_of,
    payload_bytes_at,
    reseal,
    seal,
    sealed_bytes_at,
    unseal,
)

COMPRESSED = b"SYzstd2\0"
LARGEST_PAYLOAD_BYTES = 256 * 1024 * 1024
"""What a reader that knows no bound of its own makes of one fragment at most."""

_WORD_BYTES = 4
_LEVEL = 1
_WORTHWHILE = 15 / 16  # of the fragment; what saves less is not worth its decompression
_MAGIC_BYTES = len(COMPRESSED)


def check_compression(name: str) -> bool:
    """Whether to compress. Raises ValueError for a name that is none of COMPRESSIONS."""
    if name not in COMPRESSIONS:
        raise ValueError(f"compression: must be one of {', '.join(COMPRESSIONS)}, not {name!r}")
    return name != "none"


def is_compressed(stored: memoryview) -> bool:
    """Whether this begins as the compressed form does."""
    return bytes(stored[:_MAGIC_BYTES]) == COMPRESSED


def compress(sealed: memoryview) -> memoryview | None:
    """The compressed form of header and payload, of their generation; None where it would save too little."""
    frame = _deflate(sealed[HEADER_BYTES:])
    if 2 * HEADER_BYTES + len(frame) > _WORTHWHILE * len(sealed):
        return None
    stored = memoryview(bytearray(2 * HEADER_BYTES + len(frame)))
    stored[HEADER_BYTES : 2 * HEADER_BYTES] = sealed[:HEADER_BYTES]
    stored[2 * HEADER_BYTES :] = frame
    stored[:HEADER_BYTES] = seal(key_of(sealed), stored[HEADER_BYTES:], generation_at(sealed, 0))
    stored[:_MAGIC_BYTES] = COMPRESSED
    return stored


def unseal_stored(stored: memoryview, key: bytes, generation: int) -> memoryview | Rejected:
    """As kvstore.format.sealing.unseal, of either form; what is behind the header, nothing decompressed yet."""
    if not is_compressed(stored):
        return unseal(stored, key, generation)
    stored[:_MAGIC_BYTES] = SEALED
    content = unseal(stored, key, generation)
    stored[:_MAGIC_BYTES] = COMPRESSED  # as it was: a tag covers it
    return content


def decompress(stored: memoryview, key: bytes, max_payload_bytes: int) -> memoryview | Rejected:
    """Header and payload, of its generation, out of a verified compressed form: a private copy, verified in turn."""
    if len(stored) < 2 * HEADER_BYTES:
        return Rejected("layout")
    generation = generation_at(stored, 0)
    header = memoryview(bytearray(stored[HEADER_BYTES : 2 * HEADER_BYTES]))
    reseal(header, generation)
    payload_bytes = payload_bytes_at(header, 0, key, generation)
    if isinstance(payload_bytes, Rejected):
        return payload_bytes
    planes = _inflate(stored[2 * HEADER_BYTES :], payload_bytes) if payload_bytes <= max_payload_bytes else None
    if planes is None:
        return Rejected("layout")
    sealed = CopyBuffers(HEADER_BYTES + payload_bytes).take()
    sealed[:HEADER_BYTES] = header
    _from_planes(planes, sealed[HEADER_BYTES:])
    payload = unseal(sealed, key, generation)
    return payload if isinstance(payload, Rejected) else sealed


def stored_bytes_at(header: bytes) -> int:
    """As kvstore.format.sealing.sealed_bytes_at, of either form."""
    if header.startswith(COMPRESSED):
        header = SEALED + header[_MAGIC_BYTES:]
    return sealed_bytes_at(memoryview(header), 0)


def _deflate(payload: memoryview) -> bytes:
    """One frame, each plane in blocks of its own: a block has one code, and noise would spoil that of the exponents."""
    values = np.frombuffer(payload, np.uint8)
    whole = len(values) - len(values) % _WORD_BYTES
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=len(values))
    frame: list[bytes] = []
    for plane in values[:whole].reshape(-1, _WORD_BYTES).T:
        frame += [compressor.compress(plane.tobytes()), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    frame += [compressor.compress(values[whole:].tobytes()), compressor.flush()]
    return b"".join(frame)


def _inflate(frame: memoryview, num_bytes: int) -> bytes | None:
    """The content of one whole frame that says that it has so many bytes, and has them."""
    try:
        # The library allocates what a frame says of itself, whatever bound it is given: that is looked at first.
        if zstandard.get_frame_parameters(frame).content_size != num_bytes:
            return None
        planes = zstandard.ZstdDecompressor().decompress(frame, max_output_size=num_bytes, allow_extra_data=False)
    except zstandard.ZstdError:
        return None
    return planes if len(planes) == num_bytes else None


def _from_planes(planes: bytes, payload: memoryview) -> None:
    source, target = np.frombuffer(planes, np.uint8), np.frombuffer(payload, np.uint8)
    whole = len(source) - len(source) % _WORD_BYTES
    target[:whole].reshape(-1, _WORD_BYTES)[:] = source[:whole].reshape(_WORD_BYTES, -1).T
    target[whole:] = source[whole:]
