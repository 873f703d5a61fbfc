"""Copies of fragments' payloads, and their XXH3-64 made on the way.

In one pass where the compiled module is there (kvstore/format/_copying.c), at a plain copy's speed; otherwise with
numpy and xxhash in three. Either end may be strided: payloads are gathered from a paged cache and scattered into one.
Knows nothing of headers or tiers.
"""

from __future__ import annotations

import logging
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

log = logging.getLogger(__name__)

try:
    from kvstore.format import _copying
except ImportError:  # it was installed where there is no compiler
    _copying = None  # type: ignore[assignment]
    log.warning(
        "kvstore.format._copying was not compiled: KV blocks are copied and hashed in three passes instead of one"
    )

Bytes: TypeAlias = memoryview | npt.NDArray[np.uint8]
"""Of any shape, strides and format; its bytes are those of its elements in C order. Targets are of single bytes."""

_MIN_COMPILED_BYTES = 241  # with the suffix: for fewer, XXH3 is another function


def is_compiled() -> bool:
    """Whether payloads are copied and hashed in one pass."""
    return _copying is not None


def copy(target: Bytes, source: Bytes) -> None:
    """Equally many bytes, shapes apart. Raises ValueError when they are not, and for a target that is not of bytes."""
    if np.asarray(target).itemsize > 1:
        raise ValueError("a target's elements must be single bytes")
    to, start = _bytes(target), _bytes(source)
    if to.flags.c_contiguous:
        np.copyto(to.reshape(start.shape), start)
    else:
        np.copyto(to, start.reshape(to.shape))


def copy_digests(
    targets: list[Bytes], sources: list[Bytes], suffixes: list[bytes], past_caches: bool = False
) -> list[int]:
    """Copies each source to its target; XXH3-64 of what is in each target then and of its suffix (at most 64 bytes).

    Every byte is read once: another process that changes a source meanwhile changes copy and digest alike. past_caches:
    what is written is not soon read by this processor, and need not push from its caches what is. Raises ValueError as
    copy() does; targets hold anything then.
    """
    if _copying is not None and all(
        source.nbytes + len(suffix) >= _MIN_COMPILED_BYTES for source, suffix in zip(sources, suffixes, strict=True)
    ):
        return _copying.copy_digests(targets, sources, suffixes, past_caches)
    return [_copy_digest(*each) for each in zip(targets, sources, suffixes, strict=True)]


def _copy_digest(target: Bytes, source: Bytes, suffix: bytes) -> int:
    private = np.array(_bytes(source), order="C")
    digest = xxhash.xxh3_64(private.data)
    digest.update(suffix)
    copy(target, private)
    return int(digest.intdigest())


def _bytes(buffer: Bytes) -> npt.NDArray[np.uint8]:
    """The same memory, unless its elements are larger and do not lie in one piece."""
    array = np.asarray(buffer)
    return array.view(np.uint8) if array.itemsize == 1 else np.ascontiguousarray(array).view(np.uint8)
